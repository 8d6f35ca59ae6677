//! Sockets of llmscale: `ZeroMQ` endpoints, CURVE keys and the links from an engine to its workers.
//! It moves frames of bytes with bounded queues and never blocks on a send; a peer is admitted by its
//! CURVE key or, on loopback only, without one. It knows nothing of messages, requests or models.


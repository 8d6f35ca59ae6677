//! The listening side: one ROUTER socket at one address, many peers, no blocking call.
//! With keys, a peer is admitted by the allow-list of the context and its principal comes with every message; without
//! keys only peers on this host can connect, and nobody has a name. Each call moves one message, in O(its bytes).
//! It knows nothing of what the messages mean. The owner may move it to another thread, but not share it:
//!
//! ```compile_fail,E0277
//! fn share<T: Sync>() {}
//! share::<llmscale_net::ServerEndpoint>();
//! ```

use crate::address::Address;
use crate::allow_list::MAX_LIST_KEYS;
use crate::context::Context;
use crate::counters::{ConnectionCounters, Counters};
use crate::error::NetError;
use crate::key::KeyPair;
use crate::message::Message;
use crate::options::EndpointOptions;
use crate::peer::PeerId;
use crate::poller::PollHandle;
use crate::principal::{Principal, Roles};
use crate::receive::{ReceiveError, Received, into_message};
use crate::send::{SendError, check_limits, note_outcome};
use crate::socket::{Socket, Unsent};
use crate::wake::Waker;
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Peers that may be ignored at once; the oldest is forgotten, and by then its connection has long ended.
const MAX_IGNORED_PEERS: usize = 4096;
/// Messages of ignored peers that one call drops before it lets the owner do something else.
const MAX_DROPS: usize = 64;

/// How a server proves itself and whom it admits.
#[derive(Clone, Debug)]
pub struct ServerKeys {
    /// Its own pair; clients must know the public half.
    pub own: KeyPair,
    /// The roles that may connect, of those on the context's allow-list.
    pub admitted: Roles,
}

/// A listening endpoint.
pub struct ServerEndpoint {
    // Declared before the context, hence dropped first: a context waits for its sockets.
    socket: Socket,
    address: Address,
    options: EndpointOptions,
    with_keys: bool,
    counters: Counters,
    connections: Arc<ConnectionCounters>,
    /// Parsed User-Ids; every connection of one key shares its principal.
    principals: FxHashMap<Box<str>, Arc<Principal>>,
    ignored: FxHashSet<PeerId>,
    ignored_order: VecDeque<PeerId>,
    _context: Context,
}

impl ServerEndpoint {
    /// Listens. An address that other hosts can reach needs keys.
    pub fn bind(
        context: &Context,
        address: &Address,
        keys: Option<&ServerKeys>,
        options: &EndpointOptions,
    ) -> Result<Self, NetError> {
        address.check_exposure(keys.is_some())?;
        let mut socket = Socket::open(context.raw(), zmq::ROUTER, address, options)?;
        // A send to a peer that is gone must say so, not vanish.
        socket.inner().set_router_mandatory(true).map_err(NetError::system("setting socket options"))?;
        if let Some(keys) = keys {
            if keys.admitted.is_empty() {
                return Err(NetError::NobodyAdmitted { address: address.clone() });
            }
            let inner = socket.inner();
            let set = inner.set_curve_server(true).and_then(|()| inner.set_curve_secretkey(keys.own.secret.as_bytes()));
            set.map_err(NetError::system("setting CURVE keys"))?;
            socket.enforce_authentication(&keys.admitted.domain())?;
        }
        let connections = context.watch(&socket)?;
        let address = socket.bind(address)?;
        Ok(Self {
            socket,
            address,
            options: options.clone(),
            with_keys: keys.is_some(),
            counters: Counters::default(),
            connections,
            principals: FxHashMap::default(),
            ignored: FxHashSet::default(),
            ignored_order: VecDeque::new(),
            _context: context.clone(),
        })
    }

    /// Where it listens, wildcards resolved.
    pub const fn address(&self) -> &Address {
        &self.address
    }

    /// The next message, if one has arrived. An error other than `System` is about one message, which was dropped.
    pub fn receive(&mut self) -> Result<Option<Received>, ReceiveError> {
        for _ in 0..MAX_DROPS {
            let parts = self.socket.receive().map_err(|error| ReceiveError::System(error.into()))?;
            let Some(mut parts) = parts else { return Ok(None) };
            let Some((routing_id, parts)) = parts.split_first_mut() else { return Ok(None) };
            let Some(peer) = PeerId::from_routing_id(routing_id) else {
                self.counters.malformed += 1;
                return Err(ReceiveError::ChosenIdentity);
            };
            if self.ignored.contains(&peer) {
                self.counters.malformed += 1;
                continue;
            }
            let principal = if self.with_keys { Some(self.principal(peer, parts)?) } else { None };
            let message = into_message(parts, Some(peer), &self.options, &mut self.counters)?;
            return Ok(Some(Received { peer, principal, message }));
        }
        Ok(None)
    }

    /// Who sent these parts, by the User-Id that the authentication handler gave to the connection. Without keys it is
    /// never read: a plain peer may write any User-Id into its own handshake, and libzmq hands it on.
    fn principal(&mut self, peer: PeerId, parts: &mut [zmq::Message]) -> Result<Arc<Principal>, ReceiveError> {
        let user_id = parts.first_mut().and_then(|part| part.gets("User-Id"));
        let user_id = user_id.ok_or(ReceiveError::Unauthenticated { peer })?;
        if let Some(known) = self.principals.get(user_id) {
            return Ok(Arc::clone(known));
        }
        let principal = Arc::new(Principal::from_user_id(user_id).ok_or(ReceiveError::Unauthenticated { peer })?);
        if self.principals.len() >= MAX_LIST_KEYS {
            // Only lists that were replaced many times get here; the ones still in use are parsed again.
            self.principals.clear();
        }
        self.principals.insert(user_id.into(), Arc::clone(&principal));
        Ok(principal)
    }

    /// Sends one message to a peer, or gives it back.
    pub fn send(&mut self, peer: PeerId, message: impl Into<Message>) -> Result<(), SendError> {
        let message = message.into();
        check_limits(&message, &self.options)?;
        let bytes = message.bytes();
        note_outcome(self.socket.send_to(&peer.routing_id(), message), bytes, &mut self.counters)
    }

    /// Drops whatever this peer sends from now on, counted as malformed. For a peer whose frames make no sense:
    /// libzmq can cut a connection only by itself.
    pub fn ignore(&mut self, peer: PeerId) {
        if self.ignored.insert(peer) {
            self.ignored_order.push_back(peer);
        }
        if self.ignored_order.len() > MAX_IGNORED_PEERS
            && let Some(oldest) = self.ignored_order.pop_front()
        {
            self.ignored.remove(&oldest);
        }
    }

    /// Whether this socket has heard of the end of a peer's connection; whatever the peer sent can be received by then.
    /// Only for a peer whose connection has ended: an empty message goes to one that is still there.
    pub(crate) fn is_gone(&self, peer: PeerId) -> bool {
        matches!(self.socket.send_to(&peer.routing_id(), Message::default()), Err(Unsent::Away(_)))
    }

    /// Lets what was sent leave before this endpoint does, for as long at most once it is dropped. By default nothing is
    /// waited for: what libzmq has not given to the system by then is gone.
    pub fn linger(&mut self, longest: Duration) -> Result<(), NetError> {
        self.socket.linger(longest)
    }

    /// What passed so far.
    pub fn counters(&self) -> Counters {
        self.connections.with(self.counters)
    }

    /// Wakes a poller whenever a connection begins, is admitted or refused, or ends. The first waker stays.
    pub fn wake_on_connections(&self, waker: Waker) {
        self.connections.set_waker(waker);
    }

    /// For a poller.
    pub fn poll_handle(&self) -> PollHandle<'_> {
        self.socket.poll_handle()
    }
}

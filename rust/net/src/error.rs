//! What can go wrong when an endpoint is opened or waited on. Sending and receiving have errors of their own,
//! because their callers act on them; these are for people.

use crate::address::{Address, AddressError};
use crate::key::KeyError;
use llmscale_types::LimitError;
use std::io;

/// An endpoint could not be opened, or the library failed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The address cannot be used.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A limit is out of bounds.
    #[error("endpoint options: {0}")]
    Options(#[from] LimitError),
    /// Keys could not be made or read.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// An endpoint that admits no role.
    #[error("the endpoint at {address} admits no role; name at least one of gateway, node, client")]
    NobodyAdmitted {
        /// The address.
        address: Address,
    },
    /// A live endpoint or a file that is no socket is at the path.
    #[error("{address}: {occupant} is there already; stop it or choose another path")]
    Occupied {
        /// The address.
        address: Address,
        /// What was found.
        occupant: &'static str,
    },
    /// Listening failed.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// The address was rejected; a peer that is away is no error.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// The address.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// A call failed that only fails for want of descriptors or memory.
    #[error("{operation} failed: {source}; raise the limit on open files (`ulimit -n`) or open fewer endpoints")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// Why.
        source: io::Error,
    },
}

impl NetError {
    /// Names the failed operation.
    pub(crate) fn system<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System { operation, source: source.into() }
    }
}

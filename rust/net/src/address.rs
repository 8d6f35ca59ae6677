//! Where an endpoint listens or connects: `tcp://host:port`, `ipc:///path` or `inproc://name`.
//! Parsing checks everything that libzmq would reject later with a bare number, and one rule that it lacks: an
//! address that another host can reach needs CURVE keys. O(length); it opens no socket and resolves no name.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// Longest path of a Unix socket on Linux, without its closing zero (`sun_path` has 108 bytes).
pub const MAX_IPC_PATH_BYTES: usize = 107;
/// Longest name of an in-process address.
pub const MAX_INPROC_NAME_BYTES: usize = 200;
/// Longest host name (RFC 1035).
pub const MAX_HOST_BYTES: usize = 253;

/// What is wrong with an address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AddressError {
    /// No known scheme.
    #[error("address `{given}` must begin with tcp://, ipc:// or inproc://")]
    Scheme {
        /// As given.
        given: String,
    },
    /// No port, or not one from 0 to 65535.
    #[error("address `{given}` needs a port from 1 to 65535 after the last colon, or * for a free one")]
    Port {
        /// As given.
        given: String,
    },
    /// The host is empty or not a name.
    #[error(
        "address `{given}` needs a host: a name, an IPv4 address, an IPv6 address in brackets, or * for all interfaces"
    )]
    Host {
        /// As given.
        given: String,
    },
    /// The path or name is empty, too long, or holds a zero byte.
    #[error("address `{given}` needs a path or name of 1 to {limit} bytes without control characters, it has {bytes}")]
    Name {
        /// As given.
        given: String,
        /// Bytes given.
        bytes: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// An abstract Unix socket.
    #[error("address `{given}` is in the abstract namespace, which every local user may enter; use a path")]
    Abstract {
        /// As given.
        given: String,
    },
    /// Reachable from other hosts, and no keys.
    #[error(
        "{address} is reachable from other hosts and no CURVE keys are configured; make keys with `llmscale keys` and name the key file, or use 127.0.0.1"
    )]
    KeysRequired {
        /// The address.
        address: Address,
    },
    /// Keys on a transport that does not use them.
    #[error("{address} stays inside the process and carries no CURVE; drop the keys or use ipc:// or tcp://")]
    KeysUnused {
        /// The address.
        address: Address,
    },
    /// A wildcard cannot be connected to.
    #[error("{address} is a wildcard; connect to one host and port")]
    Wildcard {
        /// The address.
        address: Address,
    },
}

/// The host of a TCP address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Host {
    /// A literal address; `localhost` is read as 127.0.0.1, so that no resolver can point it elsewhere.
    Literal(IpAddr),
    /// A host or interface name, resolved by libzmq.
    Named(String),
    /// All interfaces.
    Any,
}

/// Where an endpoint listens or connects.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// TCP; a free port is chosen when none is given.
    Tcp {
        /// Which host.
        host: Host,
        /// Which port; `None` for a free one.
        port: Option<u16>,
    },
    /// A Unix socket at a path; `*` for a free one in a folder of its own.
    Ipc(String),
    /// A queue inside this process and context.
    InProcess(String),
}

impl Address {
    /// Loopback TCP with a free port.
    pub const fn loopback() -> Self {
        Self::Tcp { host: Host::Literal(IpAddr::V4(Ipv4Addr::LOCALHOST)), port: None }
    }

    /// Whether other hosts cannot reach it. A name counts as reachable, whatever it resolves to today.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp { host: Host::Literal(address), .. } => is_loopback(*address),
            Self::Tcp { .. } => false,
            Self::Ipc(_) | Self::InProcess(_) => true,
        }
    }

    /// Whether it uses IPv6, which libzmq must be told.
    pub(crate) const fn is_ipv6(&self) -> bool {
        matches!(self, Self::Tcp { host: Host::Literal(IpAddr::V6(_)), .. })
    }

    /// The rule of exposure: an address that other hosts can reach needs keys, and one inside the process has none.
    pub fn check_exposure(&self, with_keys: bool) -> Result<(), AddressError> {
        match self {
            Self::InProcess(_) if with_keys => Err(AddressError::KeysUnused { address: self.clone() }),
            _ if with_keys || self.is_local() => Ok(()),
            _ => Err(AddressError::KeysRequired { address: self.clone() }),
        }
    }

    /// Whether a client can connect to it.
    pub fn check_connectable(&self) -> Result<(), AddressError> {
        let wildcard = match self {
            Self::Tcp { host, port } => {
                let unspecified = matches!(host, Host::Literal(address) if address.is_unspecified());
                *host == Host::Any || unspecified || port.is_none()
            }
            Self::Ipc(path) => path == "*",
            Self::InProcess(_) => false,
        };
        if wildcard { Err(AddressError::Wildcard { address: self.clone() }) } else { Ok(()) }
    }
}

/// 127.0.0.0/8, `::1`, and the former written as IPv6.
fn is_loopback(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_loopback(),
        IpAddr::V6(address) => address.is_loopback() || address.to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(given: &str) -> Result<Self, AddressError> {
        if let Some(rest) = given.strip_prefix("tcp://") {
            let (host, port) = rest.rsplit_once(':').ok_or_else(|| AddressError::Port { given: given.into() })?;
            Ok(Self::Tcp { port: parse_port(port, given)?, host: parse_host(host, given)? })
        } else if let Some(path) = given.strip_prefix("ipc://") {
            if path.starts_with('@') {
                return Err(AddressError::Abstract { given: given.into() });
            }
            check_name(path, MAX_IPC_PATH_BYTES, given).map(Self::Ipc)
        } else if let Some(name) = given.strip_prefix("inproc://") {
            check_name(name, MAX_INPROC_NAME_BYTES, given).map(Self::InProcess)
        } else {
            Err(AddressError::Scheme { given: given.into() })
        }
    }
}

fn check_name(name: &str, limit: usize, given: &str) -> Result<String, AddressError> {
    let fits = (1..=limit).contains(&name.len()) && !name.chars().any(char::is_control);
    fits.then(|| name.into()).ok_or_else(|| AddressError::Name { given: given.into(), bytes: name.len(), limit })
}

fn parse_port(text: &str, given: &str) -> Result<Option<u16>, AddressError> {
    if text == "*" {
        return Ok(None);
    }
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse::<u16>().ok().filter(|_| digits).ok_or_else(|| AddressError::Port { given: given.into() })?;
    Ok((port != 0).then_some(port))
}

fn parse_host(text: &str, given: &str) -> Result<Host, AddressError> {
    let wrong = || AddressError::Host { given: given.into() };
    if text == "*" {
        return Ok(Host::Any);
    }
    if let Some(inner) = text.strip_prefix('[') {
        let address: Ipv6Addr = inner.strip_suffix(']').and_then(|inner| inner.parse().ok()).ok_or_else(wrong)?;
        return Ok(Host::Literal(address.into()));
    }
    if let Ok(address) = text.parse::<Ipv4Addr>() {
        return Ok(Host::Literal(address.into()));
    }
    if text.eq_ignore_ascii_case("localhost") {
        return Ok(Host::Literal(Ipv4Addr::LOCALHOST.into()));
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    // "127.1" and "0x7f.1" are addresses to the C library; a name that ends in a digit-only label is refused.
    let label = text.rsplit('.').next().unwrap_or_default();
    let numeric = label.starts_with(|first: char| first.is_ascii_digit());
    let fits = (1..=MAX_HOST_BYTES).contains(&text.len()) && text.bytes().all(allowed) && !label.is_empty();
    if fits && !numeric { Ok(Host::Named(text.into())) } else { Err(wrong()) }
}

/// The form that libzmq reads.
impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ipc(path) => write!(formatter, "ipc://{path}"),
            Self::InProcess(name) => write!(formatter, "inproc://{name}"),
            Self::Tcp { host, port } => {
                match host {
                    Host::Literal(IpAddr::V4(address)) => write!(formatter, "tcp://{address}")?,
                    Host::Literal(IpAddr::V6(address)) => write!(formatter, "tcp://[{address}]")?,
                    Host::Named(name) => write!(formatter, "tcp://{name}")?,
                    Host::Any => formatter.write_str("tcp://*")?,
                }
                match port {
                    Some(port) => write!(formatter, ":{port}"),
                    None => formatter.write_str(":*"),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn an_address_is_written_as_it_was_read() {
        for text in [
            "tcp://127.0.0.1:5555",
            "tcp://127.0.0.1:*",
            "tcp://*:5555",
            "tcp://[::1]:5555",
            "tcp://node-1.lab:65535",
            "tcp://eth0:80",
            "ipc:///run/llmscale/engine.sock",
            "ipc://*",
            "inproc://step",
        ] {
            assert_eq!(address(text).to_string(), text);
        }
        assert_eq!(address("tcp://localhost:0").to_string(), "tcp://127.0.0.1:*");
    }

    #[test]
    fn an_address_that_libzmq_would_reject_is_refused_with_what_to_do() {
        for text in ["", "127.0.0.1:1", "udp://127.0.0.1:1", "TCP://127.0.0.1:1"] {
            assert!(matches!(text.parse::<Address>(), Err(AddressError::Scheme { .. })), "{text}");
        }
        for text in
            ["tcp://127.0.0.1", "tcp://host:", "tcp://host:65536", "tcp://host:-1", "tcp://host:+1", "tcp://host:x"]
        {
            assert!(matches!(text.parse::<Address>(), Err(AddressError::Port { .. })), "{text}");
        }
        for text in [
            "tcp://:1",
            "tcp://::1:1",
            "tcp://[::1:1",
            "tcp://a b:1",
            "tcp://a;b:1",
            "tcp://a/b:1",
            "tcp://127.1:1",
            "tcp://0x7f.1:1",
            "tcp://2130706433:1",
            "tcp://a.:1",
        ] {
            assert!(matches!(text.parse::<Address>(), Err(AddressError::Host { .. })), "{text}");
        }
        assert!(matches!("ipc://".parse::<Address>(), Err(AddressError::Name { bytes: 0, .. })));
        assert!(matches!("ipc:///a\0b".parse::<Address>(), Err(AddressError::Name { .. })));
        assert!(matches!("ipc://@step".parse::<Address>(), Err(AddressError::Abstract { .. })));
        let path = format!("ipc:///{}", "x".repeat(MAX_IPC_PATH_BYTES - 1));
        assert_eq!(address(&path).to_string(), path);
        assert!(matches!(
            format!("{path}x").parse::<Address>(),
            Err(AddressError::Name { bytes: 108, limit: 107, .. })
        ));
    }

    #[test]
    fn only_loopback_and_this_host_need_no_keys() {
        for text in [
            "tcp://127.0.0.1:1",
            "tcp://127.9.9.9:*",
            "tcp://localhost:1",
            "tcp://[::1]:1",
            "tcp://[::ffff:127.0.0.1]:1",
            "ipc:///x",
        ] {
            assert_eq!(address(text).check_exposure(false), Ok(()), "{text}");
            assert_eq!(address(text).check_exposure(true), Ok(()), "{text}");
        }
        for text in [
            "tcp://0.0.0.0:1",
            "tcp://*:*",
            "tcp://10.0.0.1:1",
            "tcp://[::]:1",
            "tcp://[::ffff:10.0.0.1]:1",
            "tcp://node-1:1",
        ] {
            assert_eq!(address(text).check_exposure(true), Ok(()), "{text}");
            let error = address(text).check_exposure(false).expect_err(text);
            assert!(matches!(error, AddressError::KeysRequired { .. }));
            assert!(error.to_string().contains("llmscale keys"), "{error}");
        }
        assert!(matches!(address("inproc://x").check_exposure(true), Err(AddressError::KeysUnused { .. })));
        assert_eq!(address("inproc://x").check_exposure(false), Ok(()));
    }

    #[test]
    fn a_wildcard_cannot_be_connected_to() {
        for text in ["tcp://*:1", "tcp://0.0.0.0:1", "tcp://[::]:1", "tcp://127.0.0.1:*", "ipc://*"] {
            assert!(matches!(address(text).check_connectable(), Err(AddressError::Wildcard { .. })), "{text}");
        }
        assert_eq!(address("tcp://127.0.0.1:1").check_connectable(), Ok(()));
        assert_eq!(address("inproc://x").check_connectable(), Ok(()));
    }
}

//! Authentication: the answers of ZAP 1.0 (`ZeroMQ` RFC 27) to libzmq's question who holds a public key.
//! A CURVE key on the allow-list whose role the endpoint admits gets the User-Id `role:name[:tenant]`; every other
//! question, well-formed or not, gets a refusal within the protocol. One look-up per handshake, none per frame.
//! It opens no socket: the watch thread carries question and answer.

use crate::allow_list::AllowList;
use crate::key::{KEY_BYTES, PublicKey};
use crate::principal::Roles;

/// Where libzmq asks, within a context.
pub(crate) const ZAP_ADDRESS: &str = "inproc://zeromq.zap.01";
const VERSION: &[u8] = b"1.0";
/// Bytes of a request id that are echoed; libzmq's own is one byte.
const MAX_REQUEST_ID_BYTES: usize = 255;

/// What became of a question.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Verdict {
    Admitted,
    Refused,
    Malformed,
}

/// A reply: the frames after the empty delimiter.
#[derive(PartialEq, Eq, Debug)]
pub(crate) struct Reply {
    pub(crate) verdict: Verdict,
    pub(crate) frames: [Vec<u8>; 6],
}

impl Reply {
    fn new(verdict: Verdict, request_id: &[u8], status: &str, text: &str, user_id: String) -> Self {
        let frames = [VERSION.into(), request_id.into(), status.into(), text.into(), user_id.into(), Vec::new()];
        Self { verdict, frames }
    }
}

/// The reply to the frames after the empty delimiter: version, request id, domain, address, identity, mechanism,
/// credentials.
pub(crate) fn answer(request: &[&[u8]], list: &AllowList) -> Reply {
    let request_id = request.get(1).copied().unwrap_or_default();
    let request_id = &request_id[..request_id.len().min(MAX_REQUEST_ID_BYTES)];
    let refuse = |verdict, status, text| Reply::new(verdict, request_id, status, text, String::new());
    let [version, _, domain, _, _, mechanism, credentials @ ..] = request else {
        return refuse(Verdict::Malformed, "500", "too few frames");
    };
    if *version != VERSION {
        return refuse(Verdict::Malformed, "500", "version must be 1.0");
    }
    let Some(roles) = std::str::from_utf8(domain).ok().and_then(Roles::from_domain) else {
        return refuse(Verdict::Refused, "400", "unknown domain");
    };
    if *mechanism != b"CURVE" {
        return refuse(Verdict::Refused, "400", "only CURVE is admitted");
    }
    let key = match credentials {
        [key] => <[u8; KEY_BYTES]>::try_from(*key).ok(),
        _ => None,
    };
    let Some(key) = key else {
        return refuse(Verdict::Malformed, "500", "CURVE needs one key of 32 bytes");
    };
    match list.principal(&PublicKey::from_bytes(key)) {
        Some(principal) if roles.contains(principal.role()) => {
            Reply::new(Verdict::Admitted, request_id, "200", "OK", principal.to_string())
        }
        // The two cases read alike to the peer: a key must not be told that it exists elsewhere.
        _ => refuse(Verdict::Refused, "400", "key is not admitted"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::principal::{Principal, Role};

    const KEY: [u8; KEY_BYTES] = [7; KEY_BYTES];

    fn list() -> AllowList {
        let mut list = AllowList::default();
        let client = Principal::new(Role::Client, "app", Some("acme")).expect("valid");
        assert!(list.insert(PublicKey::from_bytes(KEY), client));
        list
    }

    fn ask(frames: &[&[u8]]) -> (Verdict, String, String) {
        let reply = answer(frames, &list());
        let text = |frame: &Vec<u8>| String::from_utf8(frame.clone()).expect("text");
        assert_eq!(reply.frames[0], b"1.0");
        assert!(reply.frames[5].is_empty());
        assert_eq!(reply.frames[4].is_empty(), reply.verdict != Verdict::Admitted);
        (reply.verdict, text(&reply.frames[2]), text(&reply.frames[4]))
    }

    #[test]
    fn a_listed_key_gets_its_user_id_and_the_request_id_back() {
        let request: [&[u8]; 7] = [b"1.0", b"42", b"client", b"10.0.0.9", b"spoof", b"CURVE", &KEY];
        assert_eq!(ask(&request), (Verdict::Admitted, "200".into(), "client:app:acme".into()));
        assert_eq!(answer(&request, &list()).frames[1], b"42");
        assert_eq!(answer(&request, &AllowList::default()).verdict, Verdict::Refused);
    }

    #[test]
    fn a_key_of_another_role_an_unknown_key_and_another_mechanism_are_refused() {
        let other = [8; KEY_BYTES];
        let cases: [[&[u8]; 7]; 5] = [
            [b"1.0", b"1", b"node+gateway", b"", b"", b"CURVE", &KEY],
            [b"1.0", b"1", b"client", b"", b"", b"CURVE", &other],
            [b"1.0", b"1", b"", b"", b"", b"CURVE", &KEY],
            [b"1.0", b"1", b"\xff", b"", b"", b"CURVE", &KEY],
            [b"1.0", b"1", b"client", b"", b"", b"GSSAPI", &KEY],
        ];
        for request in cases {
            assert_eq!(ask(&request), (Verdict::Refused, "400".into(), String::new()));
        }
        assert_eq!(ask(&[b"1.0", b"1", b"client", b"", b"", b"NULL"]).0, Verdict::Refused);
    }

    #[test]
    fn a_malformed_request_is_answered_within_the_protocol() {
        let long = [1; 300];
        let cases: [&[&[u8]]; 6] = [
            &[],
            &[b"1.0"],
            &[b"1.0", b"1", b"client", b"", b""],
            &[b"2.0", b"1", b"client", b"", b"", b"CURVE", &KEY],
            &[b"1.0", &long, b"client", b"", b"", b"CURVE", &KEY[..31]],
            &[b"1.0", b"1", b"client", b"", b"", b"CURVE", &KEY, &KEY],
        ];
        for request in cases {
            let (verdict, status, user) = ask(request);
            assert_eq!((verdict, status.as_str(), user.as_str()), (Verdict::Malformed, "500", ""));
            assert!(answer(request, &list()).frames[1].len() <= MAX_REQUEST_ID_BYTES);
        }
    }
}

//! Endpoints with keys: who is admitted, as whom, and that everybody else gets nothing through and is counted.

mod support;

use llmscale_net::{
    Address, AllowList, ClientEndpoint, ClientKeys, Context, EndpointOptions, KeyPair, NetError, Phase, Principal,
    Role, Roles, SendError, ServerEndpoint, ServerKeys,
};
use std::io::{Read as _, Write as _};
use support::{eventually, fresh_folder, greeting, raw_peer, receive, receive_answer, send, tick, until_counted};

fn options() -> EndpointOptions {
    EndpointOptions { min_reconnect_us: 5000, max_reconnect_us: 20_000, ..EndpointOptions::default() }
}

/// A fleet of one server, with the keys of one principal on its list.
struct Fleet {
    context: Context,
    server: ServerEndpoint,
    server_pair: KeyPair,
    member_pair: KeyPair,
}

impl Fleet {
    fn new(role: Role, name: &str, tenant: Option<&str>, admitted: Roles) -> Self {
        Self::at(&Address::loopback(), role, name, tenant, admitted)
    }

    fn at(address: &Address, role: Role, name: &str, tenant: Option<&str>, admitted: Roles) -> Self {
        let (server_pair, member_pair) = (KeyPair::generate().expect("CURVE"), KeyPair::generate().expect("CURVE"));
        let mut list = AllowList::default();
        list.insert(member_pair.public, Principal::new(role, name, tenant).expect("valid"));
        let context = Context::new(list, 1).expect("a context");
        let keys = ServerKeys { own: server_pair.clone(), admitted };
        let server = ServerEndpoint::bind(&context, address, Some(&keys), &options()).expect("a free port");
        Self { context, server, server_pair, member_pair }
    }

    fn client(&self, own: &KeyPair, server: llmscale_net::PublicKey) -> ClientEndpoint {
        let keys = ClientKeys { own: own.clone(), server };
        ClientEndpoint::connect(&self.context, self.server.address(), Some(&keys), &options()).expect("a client")
    }

    fn member(&self) -> ClientEndpoint {
        self.client(&self.member_pair, self.server_pair.public)
    }

    /// The client keeps trying for a while, and the server hears nothing and counts refusals.
    fn refuses(&mut self, client: &mut ClientEndpoint) {
        eventually("three refusals", || {
            tick(&[self.server.poll_handle(), client.poll_handle()]);
            assert!(matches!(client.send(b"let me in".to_vec()), Err(SendError::Unreachable(_))));
            assert_eq!(client.receive().expect("nothing wrong"), None);
            assert_eq!(self.server.receive().expect("nothing wrong"), None);
            (self.server.counters().refused_peers >= 3).then_some(())
        });
        assert_eq!((self.server.counters().admitted_peers, client.counters().frames_out), (0, 0));
    }
}

#[test]
fn a_listed_key_passes_and_its_principal_comes_with_every_message() {
    let folder = fresh_folder();
    let path = folder.path().join("curve.sock");
    for text in ["tcp://127.0.0.1:*", &format!("ipc://{}", path.display())] {
        let address = text.parse().expect(text);
        let mut fleet = Fleet::at(&address, Role::Client, "app", Some("acme"), Roles::ALL);
        let mut client = fleet.member();
        for bytes in [0, 40, 100_000] {
            send(&mut client, vec![5; bytes]);
            let received = receive(&mut fleet.server);
            let principal = received.principal.expect("a principal");
            assert_eq!(principal.to_string(), "client:app:acme");
            assert_eq!((principal.role(), principal.tenant()), (Role::Client, Some("acme")));
            fleet.server.send(received.peer, received.message).expect("connected");
            assert_eq!(receive_answer(&mut client).payload, vec![5; bytes]);
        }
        assert_eq!(fleet.context.authentication().admitted, 1);
        assert_eq!(fleet.server.counters().refused_peers, 0);
    }
}

#[test]
fn a_client_that_expects_another_server_gets_nothing_through() {
    let mut fleet = Fleet::new(Role::Node, "gpu-1", None, Roles::ALL);
    let mut client = fleet.client(&fleet.member_pair, KeyPair::generate().expect("CURVE").public);
    fleet.refuses(&mut client);
    // It fails before the question of authentication comes up.
    assert_eq!(fleet.context.authentication(), llmscale_net::AuthenticationCounters::default());
}

#[test]
fn a_key_that_is_not_on_the_list_gets_nothing_through() {
    let mut fleet = Fleet::new(Role::Node, "gpu-1", None, Roles::ALL);
    let mut client = fleet.client(&KeyPair::generate().expect("CURVE"), fleet.server_pair.public);
    fleet.refuses(&mut client);
    assert!(fleet.context.authentication().refused >= 3);
    assert_eq!(fleet.context.authentication().admitted, 0);
}

#[test]
fn a_listed_key_of_a_role_that_the_endpoint_does_not_admit_gets_nothing_through() {
    let mut fleet = Fleet::new(Role::Client, "app", Some("acme"), Roles::of(&[Role::Node, Role::Gateway]));
    let mut client = fleet.member();
    fleet.refuses(&mut client);
    assert!(fleet.context.authentication().refused >= 3);
}

#[test]
fn a_plain_client_gets_nothing_through() {
    let mut fleet = Fleet::new(Role::Node, "gpu-1", None, Roles::ALL);
    let address = fleet.server.address().clone();
    let mut client = ClientEndpoint::connect(&fleet.context, &address, None, &options()).expect("a client");
    fleet.refuses(&mut client);
}

/// libzmq speaks ZMTP 1.0 and 2.0, which have no security, to peers that greet with them.
#[test]
fn a_peer_cannot_talk_the_server_down_to_an_older_protocol() {
    let mut fleet = Fleet::new(Role::Node, "gpu-1", None, Roles::ALL);
    let old: [&[u8]; 3] = [
        // 1.0: an anonymous identity, then a frame.
        b"\x01\x00\x03\x00hi",
        // 2.0: signature, revision 1, DEALER, an empty identity, then a frame.
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x01\x05\x00\x00\x00\x02hi",
        // 3.0 with a mechanism of its own choice.
        &greeting("NULL"),
    ];
    for (index, bytes) in old.iter().enumerate() {
        let mut peer = raw_peer(&fleet.server);
        // A server that hangs up while we write has refused, too.
        if peer.write_all(&bytes.repeat(if index == 0 { 50 } else { 1 })).is_ok() {
            let mut answer = Vec::new();
            assert!(matches!(peer.read_to_end(&mut answer), Ok(0..=64) | Err(_)), "the server said {answer:?}");
        }
        let ended = index as u64 + 1;
        until_counted(&mut fleet.server, "the cut", |counters| counters.ended_connections == ended);
    }
    assert_eq!(fleet.server.counters().admitted_peers, 0);
    assert_eq!(fleet.server.counters().frames_in, 0);
}

#[test]
fn a_refused_client_is_admitted_once_the_list_names_its_key() {
    let mut fleet = Fleet::new(Role::Node, "gpu-1", None, Roles::ALL);
    let late = KeyPair::generate().expect("CURVE");
    let mut client = fleet.client(&late, fleet.server_pair.public);
    fleet.refuses(&mut client);
    let mut list = AllowList::default();
    list.insert(late.public, Principal::new(Role::Node, "gpu-2", None).expect("valid"));
    fleet.context.replace_allow_list(list);
    send(&mut client, b"hello".to_vec());
    assert_eq!(receive(&mut fleet.server).principal.expect("a principal").to_string(), "node:gpu-2");
    // The watch thread may report a moment later than the first message.
    eventually("the report", || {
        tick(&[]);
        (client.phase() == Phase::Up).then_some(())
    });
    // The first key is off the list now.
    let mut former = fleet.member();
    let refused = fleet.context.authentication().refused;
    eventually("its refusal", || {
        tick(&[former.poll_handle()]);
        assert!(matches!(former.send(b"x".to_vec()), Err(SendError::Unreachable(_))));
        (fleet.context.authentication().refused > refused).then_some(())
    });
}

#[test]
fn an_endpoint_with_keys_may_listen_on_every_interface() {
    let context = support::context();
    let keys = ServerKeys { own: KeyPair::generate().expect("CURVE"), admitted: Roles::ALL };
    let everywhere: Address = "tcp://*:*".parse().expect("valid");
    let server = ServerEndpoint::bind(&context, &everywhere, Some(&keys), &options()).expect("a port");
    assert!(matches!(server.address(), Address::Tcp { port: Some(_), .. }));
    let nobody = ServerKeys { own: keys.own, admitted: Roles::of(&[]) };
    let outcome = ServerEndpoint::bind(&context, &everywhere, Some(&nobody), &options());
    assert!(matches!(outcome.err(), Some(NetError::NobodyAdmitted { .. })));
}

/// The second server key is never sent: whoever takes the port cannot read what clients say.
#[test]
fn an_impostor_at_the_servers_address_learns_nothing() {
    let fleet = Fleet::new(Role::Node, "gpu-1", None, Roles::ALL);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let keys = ClientKeys { own: fleet.member_pair.clone(), server: fleet.server_pair.public };
    let address = format!("tcp://127.0.0.1:{port}").parse().expect("valid");
    let mut client = ClientEndpoint::connect(&fleet.context, &address, Some(&keys), &options()).expect("a client");
    let (mut stream, _) = listener.accept().expect("the client");
    stream.write_all(&greeting("CURVE")).expect("a greeting");
    let mut theirs = [0; 64];
    stream.read_exact(&mut theirs).expect("a greeting");
    // The HELLO command follows; a random WELCOME must end the handshake.
    let mut hello = [0; 202];
    stream.read_exact(&mut hello).expect("a HELLO");
    let mut welcome = vec![4, 168];
    welcome.extend(b"\x07WELCOME");
    welcome.extend([9; 160]);
    stream.write_all(&welcome).expect("a WELCOME");
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).expect("the client hangs up");
    assert!(rest.is_empty());
    assert!(matches!(client.send(b"secret".to_vec()), Err(SendError::Unreachable(_))));
}

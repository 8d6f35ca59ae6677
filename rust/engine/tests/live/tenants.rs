//! Whose cached prefixes a peer may learn of, by its key.

use super::peer::Peer;
use super::{Node, limits, wait_until};
use llmscale_net::{AllowList, ClientKeys, KeyPair, Principal, Role, Roles, ServerKeys};
use llmscale_types::Token;
use llmscale_wire::{FromNode, KvAsk, ToNode};

/// A namespace as a gateway makes it for a tenant; every client knows what it is made of.
const SPACE: [u8; 32] = [5; 32];

struct Keys {
    node: KeyPair,
    list: AllowList,
}

impl Keys {
    fn give(&mut self, role: Role, name: &str, tenant: Option<&str>) -> ClientKeys {
        let own = KeyPair::generate().unwrap();
        assert!(self.list.insert(own.public, Principal::new(role, name, tenant).unwrap()));
        ClientKeys { own, server: self.node.public }
    }
}

#[test]
fn a_client_finds_its_own_tenants_prefixes_at_a_node_and_no_others_whatever_namespace_it_sends() {
    let mut keys = Keys { node: KeyPair::generate().unwrap(), list: AllowList::default() };
    let gateway = keys.give(Role::Gateway, "front", None);
    let acme = ["one", "two"].map(|name| keys.give(Role::Client, name, Some("acme")));
    let zeta = keys.give(Role::Client, "three", Some("zeta"));
    let door = ServerKeys { own: keys.node.clone(), admitted: Roles::ALL };
    let mut node = Node::with_keys(None, 1, limits(), keys.list, Some(&door));
    let worker = node.give_worker(u64::MAX);
    let prompt: Vec<Token> = (1..40).collect();
    let mut gateway = Peer::greeted(&node, Some(&gateway));
    let cached = |keys: &ClientKeys| Peer::greeted(&node, Some(keys)).cached(1, SPACE, &prompt);
    assert_eq!(gateway.cached(1, SPACE, &prompt), 0);
    assert_eq!(cached(&acme[0]), 0, "what a gateway's tenant has sent");
    assert!(cached(&acme[1]) > 0, "what another program of the tenant has sent");
    assert_eq!(cached(&zeta), 0, "what a client of another tenant has sent");
    assert!(gateway.cached(2, SPACE, &prompt) > 0, "what its tenant has sent through it");
    node.bury(worker);
}

#[test]
fn a_client_is_not_told_the_names_of_prefixes_and_a_gateway_is() {
    let mut keys = Keys { node: KeyPair::generate().unwrap(), list: AllowList::default() };
    let gateway = keys.give(Role::Gateway, "front", None);
    let client = keys.give(Role::Client, "one", Some("acme"));
    let door = ServerKeys { own: keys.node.clone(), admitted: Roles::ALL };
    let mut node = Node::with_keys(None, 1, limits(), keys.list, Some(&door));
    let worker = node.give_worker(u64::MAX);
    let (mut gateway, mut client) = (Peer::greeted(&node, Some(&gateway)), Peer::greeted(&node, Some(&client)));
    let before = node.handle.report().map_or(0, |report| report.dropped_frames);
    client.say(&ToNode::KvAsk(KvAsk { from: 0 }));
    client.catch_up(1);
    gateway.say(&ToNode::KvAsk(KvAsk { from: 0 }));
    let prompt: Vec<Token> = (1..40).collect();
    gateway.cached(1, SPACE, &prompt);
    let tells = |frame: &FromNode| matches!(frame, FromNode::KvSnapshot(_) | FromNode::KvChanges(_));
    if !gateway.heard.iter().any(tells) {
        gateway.hears("names of prefixes", tells);
    }
    client.catch_up(2);
    client.cached(1, SPACE, &prompt);
    client.catch_up(3);
    assert!(!client.heard.iter().any(tells));
    wait_until("the ignored question is counted", || {
        node.handle.report().is_some_and(|report| report.dropped_frames > before)
    });
    node.bury(worker);
}

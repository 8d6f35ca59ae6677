//! What a client may share KV blocks with. A gateway names tenants itself and is trusted to; a client has one tenant, that
//! of its key, whatever namespace it sends: the names of other tenants' namespaces follow from what every client knows.
//! O(1). Knows one secret and no requests.

use llmscale_net::{Principal, SecretKey};

/// See the file's header.
#[derive(Debug)]
pub(crate) struct ClientNamespaces {
    key: [u8; 32],
}

impl ClientNamespaces {
    /// Those of a node that holds this key. Nodes of one fleet hold the same, so a client's prefixes outlive a node where
    /// gateways' do, and no client or gateway can name them.
    pub(crate) fn new(node: &SecretKey) -> Self {
        Self { key: node.derive("llmscale 2026-11 namespaces of the clients of a node") }
    }

    /// What a client's submission is computed under; `None` for a principal that is no client.
    pub(crate) fn of(&self, principal: &Principal, given: &[u8; 32]) -> Option<[u8; 32]> {
        let tenant = principal.tenant()?;
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(&(tenant.len() as u64).to_le_bytes());
        hasher.update(tenant.as_bytes());
        hasher.update(given);
        Some(*hasher.finalize().as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llmscale_net::Role;

    fn client(name: &str, tenant: &str) -> Principal {
        Principal::new(Role::Client, name, Some(tenant)).expect("a client")
    }

    #[test]
    fn a_clients_namespace_is_that_of_its_tenant_and_of_nobody_else() {
        let names = ClientNamespaces::new(&SecretKey::from_bytes([1; 32]));
        let (acme, given) = (client("app", "acme"), [7; 32]);
        let own = names.of(&acme, &given);
        assert_eq!(own, names.of(&client("other-app", "acme"), &given), "programs of one tenant share");
        assert_eq!(own, ClientNamespaces::new(&SecretKey::from_bytes([1; 32])).of(&acme, &given), "it outlives a node");
        let other_node = ClientNamespaces::new(&SecretKey::from_bytes([2; 32]));
        let others = [
            Some(given),
            names.of(&client("app", "zeta"), &given),
            names.of(&acme, &[8; 32]),
            other_node.of(&acme, &given),
        ];
        assert!(!others.contains(&own));
        for role in [Role::Gateway, Role::Node] {
            let trusted = Principal::new(role, "one", None).expect("a name");
            assert_eq!(names.of(&trusted, &given), None, "{role} names tenants itself");
        }
    }
}

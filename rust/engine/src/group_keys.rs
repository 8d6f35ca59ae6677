//! Who may meet whom between the hosts of one replica: every host holds the fleet's node key pair, proves it, and asks the
//! other side to prove it too. O(1). Knows one pair and no list: gateways and clients have no business at these doors.

use llmscale_net::{AllowList, ClientKeys, Context, KeyPair, NetError, Principal, Role, Roles, ServerKeys};

/// The pair of the fleet's nodes; without one, hosts meet on loopback only.
#[derive(Clone, Debug, Default)]
pub struct GroupKeys(Option<KeyPair>);

impl GroupKeys {
    /// Keys of a fleet whose nodes hold this pair.
    pub const fn new(pair: Option<KeyPair>) -> Self {
        Self(pair)
    }

    /// A context that admits this pair as a node, and nobody else.
    pub fn context(&self) -> Result<Context, NetError> {
        let mut list = AllowList::default();
        if let Some(pair) = &self.0 {
            let node = Principal::new(Role::Node, "fleet", None).expect("a good name");
            list.insert(pair.public, node);
        }
        Context::new(list, 1)
    }

    /// For the side that listens.
    pub fn server(&self) -> Option<ServerKeys> {
        let own = self.0.clone()?;
        Some(ServerKeys { own, admitted: Roles::of(&[Role::Node]) })
    }

    /// For the side that connects.
    pub fn client(&self) -> Option<ClientKeys> {
        let own = self.0.clone()?;
        Some(ClientKeys { server: own.public, own })
    }
}

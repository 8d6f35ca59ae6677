//! Who a peer is, once its key was found on the allow-list: a role, a name and, for a client, its tenant.
//! The text form `role:name[:tenant]` is what the authentication handler hands to libzmq as the User-Id of a
//! connection; libzmq attaches it to every frame. O(length); it does not know keys or sockets.

use std::fmt;

/// Longest name of a principal or tenant, in characters.
pub const MAX_NAME_CHARACTERS: usize = 64;

/// What a key may be used for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum Role {
    /// Speaks for many tenants and names them itself.
    Gateway,
    /// A host of the fleet: engines and workers.
    Node,
    /// One tenant's own program.
    Client,
}

impl Role {
    /// All roles, in order.
    pub const ALL: [Self; 3] = [Self::Gateway, Self::Node, Self::Client];

    /// Its word in files and User-Ids.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Node => "node",
            Self::Client => "client",
        }
    }

    /// The role of a word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.word() == word)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.word())
    }
}

/// A set of roles that an endpoint admits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Roles(u8);

impl Roles {
    /// Every role.
    pub const ALL: Self = Self(0b111);

    /// The set of the given roles.
    pub fn of(roles: &[Role]) -> Self {
        Self(roles.iter().fold(0, |set, role| set | 1 << *role as u8))
    }

    /// Whether a role is in the set.
    pub const fn contains(self, role: Role) -> bool {
        self.0 & 1 << role as u8 != 0
    }

    /// Whether nobody is admitted.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Its words, joined by `+`; the form that the authentication handler receives as the domain.
    pub fn domain(self) -> String {
        let words: Vec<&str> = Role::ALL.into_iter().filter(|role| self.contains(*role)).map(Role::word).collect();
        words.join("+")
    }

    /// The set of a domain; `None` for a word that is no role, so that an unknown domain admits nobody.
    pub fn from_domain(domain: &str) -> Option<Self> {
        let roles: Option<Vec<Role>> = domain.split('+').map(Role::from_word).collect();
        roles.map(|roles| Self::of(&roles))
    }
}

/// A name that is safe in files, metrics and User-Ids: 1 to 64 letters, digits, `.`, `_` or `-`.
pub(crate) fn is_name(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=MAX_NAME_CHARACTERS).contains(&text.len()) && text.bytes().all(allowed)
}

/// The holder of an admitted key.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Principal {
    role: Role,
    name: Box<str>,
    tenant: Option<Box<str>>,
}

impl Principal {
    /// A principal of checked parts; `None` when a part is no name, a client has no tenant, or another role has one.
    pub fn new(role: Role, name: &str, tenant: Option<&str>) -> Option<Self> {
        let fits = is_name(name) && tenant.is_none_or(is_name) && (role == Role::Client) == tenant.is_some();
        fits.then(|| Self { role, name: name.into(), tenant: tenant.map(Into::into) })
    }

    /// What the key may be used for.
    pub const fn role(&self) -> Role {
        self.role
    }

    /// Who it is, within the role.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The tenant that a client is bound to; `None` for the other roles.
    pub fn tenant(&self) -> Option<&str> {
        self.tenant.as_deref()
    }

    /// The principal of a User-Id.
    pub fn from_user_id(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let role = Role::from_word(parts.next()?)?;
        let (name, tenant) = (parts.next()?, parts.next());
        if parts.next().is_some() { None } else { Self::new(role, name, tenant) }
    }
}

/// The User-Id.
impl fmt::Display for Principal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.role, self.name)?;
        self.tenant.as_ref().map_or(Ok(()), |tenant| write!(formatter, ":{tenant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_id_is_read_back_as_the_same_principal() {
        for (role, name, tenant) in
            [(Role::Gateway, "edge-1", None), (Role::Node, "a.b_c", None), (Role::Client, "app", Some("acme"))]
        {
            let principal = Principal::new(role, name, tenant).expect("valid");
            assert_eq!(Principal::from_user_id(&principal.to_string()), Some(principal));
        }
        assert_eq!(Principal::new(Role::Client, "app", Some("acme")).expect("valid").to_string(), "client:app:acme");
    }

    #[test]
    fn a_user_id_that_no_handler_wrote_is_nobody() {
        let long = "x".repeat(65);
        for text in [
            "",
            "node",
            "node:",
            "root:x",
            "node:a:b",
            "client:a",
            "client:a:",
            "client:a:b:c",
            "node:a b",
            "Node:a",
            &format!("node:{long}"),
        ] {
            assert_eq!(Principal::from_user_id(text), None, "{text}");
        }
    }

    #[test]
    fn a_domain_names_the_roles_and_an_unknown_one_admits_nobody() {
        for set in [&[Role::Node][..], &[Role::Gateway, Role::Client], &Role::ALL] {
            assert_eq!(Roles::from_domain(&Roles::of(set).domain()), Some(Roles::of(set)));
        }
        assert_eq!(Roles::from_domain(""), None);
        assert_eq!(Roles::from_domain("node+admin"), None);
        assert!(!Roles::of(&[Role::Node]).contains(Role::Client));
    }
}

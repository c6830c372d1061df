//! Names to addresses, none of which is nearer than the rule for the name allows.

use std::net::SocketAddr;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::plugin::grants::rules::{Nearness, nearness};

/// Finds the addresses of a name: the system's way, or what a test says.
pub(in crate::plugin::grants) type Lookup =
    Arc<dyn Fn(&str) -> std::io::Result<Vec<SocketAddr>> + Send + Sync>;

/// As the system resolves names.
pub(in crate::plugin::grants) fn system_lookup() -> Lookup {
    Arc::new(|name| Ok(std::net::ToSocketAddrs::to_socket_addrs(&(name, 0))?.collect()))
}

/// A name that stands for an address which is not allowed to stand behind a name.
#[derive(Debug, thiserror::Error)]
#[error("`{name}` is at {address}, which is not an address of the internet")]
pub(super) struct TooNear {
    name: String,
    address: std::net::IpAddr,
}

pub(super) struct Resolver {
    nearest: Nearness,
    lookup: Lookup,
}

impl Resolver {
    pub(super) fn new(nearest: Nearness, lookup: Lookup) -> Self {
        Self { nearest, lookup }
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (nearest, lookup) = (self.nearest, Arc::clone(&self.lookup));
        Box::pin(async move {
            let name = name.as_str().to_owned();
            let look = tokio::task::spawn_blocking(move || checked(&name, nearest, &lookup));
            let found = look.await??;
            let addresses: Addrs = Box::new(found.into_iter());
            Ok(addresses)
        })
    }
}

/// One address too near refuses all: whoever mixes them means harm.
fn checked(
    name: &str,
    nearest: Nearness,
    lookup: &Lookup,
) -> Result<Vec<SocketAddr>, Box<dyn std::error::Error + Send + Sync>> {
    let found = lookup(name)?;
    match found.iter().find(|a| nearness(a.ip()) > nearest) {
        Some(address) => Err(Box::new(TooNear {
            name: name.to_owned(),
            address: address.ip(),
        })),
        None => Ok(found),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_that_is_too_near_refuses_the_name() {
        let lookup: Lookup = Arc::new(|_| {
            Ok(vec![
                "8.8.8.8:0".parse().unwrap(),
                "10.0.0.1:0".parse().unwrap(),
            ])
        });
        let near = checked("a.example", Nearness::Public, &lookup).unwrap_err();
        assert_eq!(
            near.to_string(),
            "`a.example` is at 10.0.0.1, which is not an address of the internet"
        );
        assert_eq!(checked("a", Nearness::Local, &lookup).unwrap().len(), 2);
        let metadata: Lookup = Arc::new(|_| Ok(vec!["169.254.169.254:0".parse().unwrap()]));
        assert!(checked("a", Nearness::Local, &metadata).is_err());
    }
}

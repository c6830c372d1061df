//! Which hosts and addresses a plugin with the `http` grant may speak with.
//!
//! A name says little: it may stand for this machine today and for another tomorrow. So every address that a name
//! resolves to is looked at, and what is near (this machine, its network, its cloud's metadata) needs to be named as such.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use reqwest::Url;

use crate::plugin::log::is_printable;

/// A host as manifests and configs name it: `HOST`, `HOST:PORT`, each with `http://` in front if plain HTTP is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HostRule {
    plain: bool,
    /// As a URL has it: lower case, IDNA; IPv6 in brackets.
    host: String,
    port: u16,
    /// Whether a port was written.
    with_port: bool,
    address: Option<IpAddr>,
}

/// How near an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Nearness {
    /// Anywhere on the internet.
    Public,
    /// This machine or its network.
    Local,
    /// Addresses that no server of the operator's has by chance: link-local with the metadata of clouds, multicast,
    /// unspecified, reserved.
    Special,
}

impl HostRule {
    /// Reads a host.
    ///
    /// # Errors
    /// What is none, in one line.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let shown = || crate::plugin::printable(text, 100);
        let wrong = |why: &str| Err(format!("`{}` {why}", shown()));
        let (plain, rest) = match text.strip_prefix("http://") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        if rest.contains('*') {
            return wrong("has a `*`: hosts are named one by one");
        }
        if rest.is_empty() || !is_printable(rest) || rest.contains(['/', '@', '?', '#', '\\', ' '])
        {
            return wrong("is no HOST, HOST:PORT, http://HOST or http://HOST:PORT");
        }
        let scheme = if plain { "http" } else { "https" };
        let Ok(url) = Url::parse(&format!("{scheme}://{rest}/")) else {
            return wrong("is no host");
        };
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return wrong("is no host");
        };
        // The brackets of IPv6 hold colons of their own.
        let after = rest.rsplit_once(']').map_or(rest, |(_, after)| after);
        Ok(Self {
            plain,
            host: host.to_owned(),
            port,
            with_port: after.contains(':'),
            address: literal(host),
        })
    }

    fn covers(&self, url: &Url) -> bool {
        let plain = url.scheme() == "http";
        (plain, url.host_str(), url.port_or_known_default())
            == (self.plain, Some(&self.host), Some(self.port))
    }

    /// The nearest address that it allows: one that is named itself may be any, and who writes a port means a server of their
    /// own.
    fn nearest(&self) -> Nearness {
        match (self.address, self.with_port) {
            (Some(_), _) => Nearness::Special,
            (None, true) => Nearness::Local,
            (None, false) => Nearness::Public,
        }
    }
}

/// How near the addresses of a URL's host may be.
///
/// # Errors
/// A URL that no rule covers, or that has what no URL of a plugin may have; in one line, without its path.
pub(super) fn admit(url: &Url, rules: &[HostRule]) -> Result<Nearness, String> {
    if !url.username().is_empty() || url.password().is_some() {
        return Err("a URL with a user or password".to_owned());
    }
    if !matches!(url.scheme(), "http" | "https") {
        return Err(format!("a URL of the scheme `{}`", url.scheme()));
    }
    let host = url.host_str().unwrap_or_default();
    let covering = rules.iter().filter(|rule| rule.covers(url));
    let nearest = covering.map(HostRule::nearest).max();
    let Some(nearest) = nearest else {
        let port = url.port().map_or(String::new(), |port| format!(":{port}"));
        let scheme = url.scheme();
        return Err(format!(
            "`{scheme}://{host}{port}` is not among the hosts of the grant"
        ));
    };
    match literal(host) {
        Some(address) if nearness(address) > nearest => {
            Err(format!("`{host}` is not an address of the internet"))
        }
        _ => Ok(nearest),
    }
}

/// An address that stands where a name could.
fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[')
        .trim_end_matches(']')
        .parse()
        .ok()
}

/// Where an address is, by the registries of special-purpose addresses (RFC 6890) and the metadata services of clouds.
pub(super) fn nearness(address: IpAddr) -> Nearness {
    match address {
        IpAddr::V4(address) => of_v4(address),
        IpAddr::V6(address) => of_v6(address),
    }
}

fn of_v4(address: Ipv4Addr) -> Nearness {
    // Alibaba Cloud's metadata service is in the range of carriers' networks.
    if address == Ipv4Addr::new(100, 100, 100, 200) {
        return Nearness::Special;
    }
    match address.octets() {
        [127 | 10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..] => {
            Nearness::Local
        }
        // Documentation and benchmarks have no servers.
        [0 | 224..=255, ..]
        | [169, 254, ..]
        | [192, 0, 0 | 2, _]
        | [192, 88, 99, _]
        | [198, 18 | 19, ..]
        | [198, 51, 100, _]
        | [203, 0, 113, _] => Nearness::Special,
        _ => Nearness::Public,
    }
}

fn of_v6(address: Ipv6Addr) -> Nearness {
    let [a, b, c, ..] = address.segments();
    let embedded = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        of_v4(Ipv4Addr::new(a, b, c, d))
    };
    let last = || embedded(address.segments()[6], address.segments()[7]);
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => Nearness::Special,
        [0, 0, 0, 0, 0, 0, 0, 1] => Nearness::Local,
        // AWS's metadata service.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => Nearness::Special,
        // IPv4 inside: mapped, compatible, translated (NAT64, also of a network of one's own), 6to4.
        [0, 0, 0, 0, 0, 0xffff | 0, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => last(),
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => last(),
        [0x64, 0xff9b, 1, ..] => Nearness::Special,
        [0x2002, ..] => embedded(b, c),
        // Teredo, documentation, and what else the IETF keeps for itself.
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, ..] => Nearness::Special,
        _ => match a {
            0xfc00..=0xfdff => Nearness::Local,
            // Of what is left only 2000::/3 has been given out.
            0x2000..=0x3fff => Nearness::Public,
            _ => Nearness::Special,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(hosts: &[&str]) -> Vec<HostRule> {
        hosts.iter().map(|h| HostRule::parse(h).unwrap()).collect()
    }

    fn admitted(url: &str, hosts: &[&str]) -> Option<Nearness> {
        admit(&Url::parse(url).unwrap(), &rules(hosts)).ok()
    }

    #[test]
    fn hosts_are_matched_as_a_whole_with_scheme_and_port() {
        let hosts = [
            "api.example.com",
            "http://10.0.0.5:8080",
            "b.example:8443",
            "[2001:4860::1]",
        ];
        for (url, expected) in [
            ("https://api.example.com/v1?q=1", Some(Nearness::Public)),
            ("https://API.Example.com:443/", Some(Nearness::Public)),
            ("https://api.example.com:444/", None),
            ("http://api.example.com/", None),
            ("https://api.example.com./", None),
            ("https://evil.com/api.example.com", None),
            ("https://api.example.com.evil.com/", None),
            ("https://api.example.com@evil.com/", None),
            ("https://u:p@api.example.com/", None),
            ("ftp://api.example.com/", None),
            ("http://10.0.0.5:8080/", Some(Nearness::Special)),
            ("http://0x0a.5:8080/", Some(Nearness::Special)),
            ("https://10.0.0.5:8080/", None),
            ("http://10.0.0.5/", None),
            ("https://b.example:8443/", Some(Nearness::Local)),
            ("https://[2001:4860::1]/", Some(Nearness::Special)),
        ] {
            assert_eq!(admitted(url, &hosts), expected, "{url}");
        }
    }

    #[test]
    fn hosts_that_are_none_are_refused() {
        for bad in [
            "",
            "*",
            "*.example.com",
            "a/b",
            "u@a",
            "https://a",
            "a b",
            "http://",
            "a:99999",
            "ftp://a",
            "a#b",
            "a\n.example",
            "a\u{202e}b",
        ] {
            assert!(HostRule::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_by_where_they_are() {
        use Nearness::{Local, Public, Special};
        for (address, expected) in [
            ("8.8.8.8", Public),
            ("172.32.0.1", Public),
            ("127.0.0.1", Local),
            ("127.255.0.9", Local),
            ("10.1.2.3", Local),
            ("172.31.0.1", Local),
            ("192.168.0.1", Local),
            ("100.64.0.1", Local),
            ("100.100.100.200", Special),
            ("169.254.169.254", Special),
            ("0.0.0.0", Special),
            ("0.1.2.3", Special),
            ("224.0.0.1", Special),
            ("255.255.255.255", Special),
            ("192.0.2.1", Special),
            ("2606:4700::1111", Public),
            ("::1", Local),
            ("::", Special),
            ("fd00:ec2::254", Special),
            ("fd12::1", Local),
            ("fe80::1", Special),
            ("ff02::1", Special),
            ("::ffff:8.8.8.8", Public),
            ("::ffff:127.0.0.1", Local),
            ("::ffff:169.254.169.254", Special),
            ("::127.0.0.1", Local),
            ("64:ff9b::169.254.169.254", Special),
            ("64:ff9b::8.8.8.8", Public),
            ("64:ff9b:1::1", Special),
            ("2002:7f00:1::", Local),
            ("2002:a9fe:a9fe::", Special),
            ("2001::1", Special),
            ("2001:db8::1", Special),
            ("4000::1", Special),
        ] {
            assert_eq!(nearness(address.parse().unwrap()), expected, "{address}");
        }
    }
}

//! Datagrams to ports of the host: a sender that goes on sending from one port would be led to the pod that had the host's port when it began,
//! or to the host itself if nobody had.

use std::net::{IpAddr, SocketAddr};

use super::HostPort;
use crate::{
    Protocol,
    conntrack::{self, Flow},
    error::{Error, Result},
    namespace::Namespace,
    netlink::Netlink,
};

/// Lets flows by ports of the host lead where these lead `now`. Those that led nowhere but to `before`'s pods end.
pub(super) async fn follow(host: Namespace, before: &[HostPort], now: &[HostPort]) -> Result<()> {
    let of_udp = |ports: &[HostPort]| -> Vec<HostPort> {
        ports.iter().filter(|port| port.protocol == Protocol::Udp).cloned().collect()
    };
    let (before, now) = (of_udp(before), of_udp(now));
    if before.is_empty() && now.is_empty() {
        return Ok(());
    }
    let own = Netlink::open(&host)?.all_addresses().await?;
    // There may be many flows.
    let forgotten = tokio::task::spawn_blocking(move || {
        conntrack::forget(&host, |flow| {
            let is_own = flow.to.ip().is_loopback() || own.contains(&flow.to.ip());
            is_own && is_stale(flow, &before, &now)
        })
    });
    forgotten.await.unwrap_or_else(|e| {
        let place = "host".to_owned();
        Err(Error::Netlink { action: "forget flows".to_owned(), place, source: std::io::Error::other(e) })
    })
}

/// Whether a flow to one of the host's own addresses leads elsewhere than it would if it began now. What somebody else leads somewhere (a Service's
/// port) isn't touched.
fn is_stale(flow: &Flow, before: &[HostPort], now: &[HostPort]) -> bool {
    let leads_to =
        |ports: &'_ [HostPort]| -> Vec<SocketAddr> { ports.iter().filter_map(|port| target(port, flow.to)).collect() };
    match leads_to(now).first() {
        Some(target) => flow.by != *target,
        None => leads_to(before).contains(&flow.by),
    }
}

/// Where a port of the host leads what is sent to one of the host's addresses; none if it is another one.
fn target(port: &HostPort, to: SocketAddr) -> Option<SocketAddr> {
    let is_at = |at: IpAddr| at == to.ip() || (at.is_unspecified() && at.is_ipv4() == to.is_ipv4());
    if port.port != to.port() || !port.at.is_none_or(is_at) {
        return None;
    }
    let pod = port.pod.iter().find(|pod| pod.is_ipv4() == to.is_ipv4())?;
    Some(SocketAddr::new(*pod, port.pod_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(at: Option<&str>, port: u16, pods: &[&str]) -> HostPort {
        let pod = pods.iter().map(|pod| pod.parse().unwrap()).collect();
        HostPort { at: at.map(|at| at.parse().unwrap()), protocol: Protocol::Udp, port, pod, pod_port: 53 }
    }

    #[test]
    fn a_flow_is_stale_that_would_go_elsewhere_now() {
        let stale = |to: &str, by: &str, before: &[HostPort], now: &[HostPort]| {
            is_stale(&Flow { to: to.parse().unwrap(), by: by.parse().unwrap() }, before, now)
        };
        let (old, new) = (port(None, 80, &["10.0.0.5", "fd44::5"]), port(None, 80, &["10.0.0.6", "fd44::6"]));
        let (to, to_ipv6) = ("192.0.2.1:80", "[fd00::1]:80");
        let (old, new) = (&[old][..], &[new][..]);
        assert!(stale(to, "10.0.0.5:53", old, new) && stale(to_ipv6, "[fd44::5]:53", old, new));
        assert!(!stale(to, "10.0.0.6:53", old, new) && !stale(to_ipv6, "[fd44::6]:53", old, new));
        assert!(stale(to, "10.0.0.5:54", &[], new), "whoever led it there");
        assert!(stale(to, to, &[], new) && stale(to, to, old, new), "it began before anybody had the port");
        assert!(stale(to, "10.0.0.5:53", old, &[]), "nobody has it");
        assert!(!stale(to, to, old, &[]), "the host's own");
        assert!(!stale(to, "10.0.0.9:53", old, &[]), "a Service's");
        assert!(!stale("192.0.2.1:81", "10.0.0.5:53", old, new), "another port");
    }

    #[test]
    fn a_port_is_at_the_address_that_it_is_asked_for() {
        let leads = |at: Option<&str>, to: &str| target(&port(at, 80, &["10.0.0.5"]), to.parse().unwrap()).is_some();
        assert!(leads(None, "192.0.2.1:80") && leads(Some("0.0.0.0"), "192.0.2.1:80"));
        assert!(leads(Some("192.0.2.1"), "192.0.2.1:80") && !leads(Some("192.0.2.2"), "192.0.2.1:80"));
        assert!(!leads(Some("::"), "192.0.2.1:80") && !leads(None, "[fd00::1]:80"), "the pod has no IPv6");
    }
}

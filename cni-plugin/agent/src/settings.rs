//! What the agent is told when it starts.

use std::{net::IpAddr, path::PathBuf};

use portolan_dns::Domain;

use crate::conflist::{self, ConflistError};

/// Where the CNI plugin finds the agent, as the host sees it.
pub(crate) const SOCKET: &str = "/run/portolan/cni.sock";
/// Where the journal is, as the host sees it.
const JOURNAL: &str = "/var/lib/portolan/network/endpoints";
/// Where the pods on the pod network are, as the host sees it.
const PODS: &str = "/var/lib/portolan/network/pods";
/// Which of their addresses were given last, as the host sees it.
const LAST_POD: &str = "/var/lib/portolan/network/last-pod.json";
/// Where the names that were known last are, as the host sees it.
const NAMES: &str = "/var/lib/portolan/network/names.json";
/// Where it is what this node knew when it last heard from the API server, as the host sees it: it is to go with the boot.
const KNOWN: &str = "/run/portolan/known";
/// Where this node's private keys are, as the host sees it.
const KEYS: &str = "/var/lib/portolan/network/keys.json";

/// How the agent runs.
#[derive(Clone, Debug, clap::Args)]
pub struct Settings {
    /// This node's name.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// This node's address on the underlay: the tunnels' endpoint.
    #[arg(long, env = "HOST_IP", value_parser = portolan_runtime::address::host_ip)]
    pub host_ip: IpAddr,
    /// Where the host's root directory is seen.
    #[arg(long, default_value = "/host")]
    pub host_root: PathBuf,
    /// The container runtime's configurations, as the host sees them.
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// The container runtime's plugins, as the host sees them.
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// The CNI plugin to install, in this image.
    #[arg(long, default_value = "/portolan-cni")]
    pub cni_plugin: PathBuf,
    /// Portolan is the container runtime's only plugin, and makes the pod network of the cluster, too.
    #[arg(long)]
    pub primary: bool,
    /// UDP port of the tunnels, the same on all nodes.
    #[arg(long, default_value_t = 7789)]
    pub vxlan_port: u16,
    /// The first of two UDP ports of encrypted networks' WireGuard, the same on all nodes.
    #[arg(long, default_value_t = 7795, value_parser = clap::value_parser!(u16).range(1..65535))]
    pub wireguard_port: u16,
    /// TCP port for health and metrics.
    #[arg(long, default_value_t = 7793)]
    pub http_port: u16,
    /// The cluster's DNS server; that of Service kube-system/kube-dns if not given.
    #[arg(long)]
    pub cluster_dns: Option<IpAddr>,
    /// The domain in which all networks' names are full ones (portolan.internal); none if not given.
    #[arg(long)]
    pub dns_domain: Option<Domain>,
    /// Pods that admission has missed reach our DNS server at the address of the cluster's.
    #[arg(long)]
    pub dns_redirect: bool,
    /// UDP and TCP port, on this node's address, at which full names are answered to everyone; not at all if not given.
    #[arg(long, requires = "dns_domain")]
    pub dns_everyone_port: Option<u16>,
}

impl Settings {
    /// A path of the host as this process sees it.
    pub(crate) fn on_host(&self, path: impl AsRef<std::path::Path>) -> PathBuf {
        let path = path.as_ref();
        self.host_root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(crate) fn journal(&self) -> PathBuf {
        self.on_host(JOURNAL)
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.on_host(PODS)
    }

    pub(crate) fn last_pod(&self) -> PathBuf {
        self.on_host(LAST_POD)
    }

    pub(crate) fn names(&self) -> PathBuf {
        self.on_host(NAMES)
    }

    pub(crate) fn keys(&self) -> PathBuf {
        self.on_host(KEYS)
    }

    pub(crate) fn known(&self) -> PathBuf {
        self.on_host(KNOWN)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.on_host(SOCKET)
    }
}

/// What `uninstall` needs to know.
#[derive(Clone, Debug, clap::Args)]
pub struct UninstallSettings {
    /// Where the host's root directory is seen.
    #[arg(long, default_value = "/host")]
    pub host_root: PathBuf,
    /// The container runtime's configurations, as the host sees them.
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// The container runtime's plugins, as the host sees them.
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
}

/// Takes Portolan out of the node's container runtime. Pods that run keep their interfaces until they end. No agent may run
/// beside: it would write the configuration again.
///
/// # Errors
/// When a file can't be removed.
pub fn uninstall(settings: &UninstallSettings) -> Result<(), ConflistError> {
    let on_host = |path: &PathBuf| settings.host_root.join(path.strip_prefix("/").unwrap_or(path));
    conflist::uninstall(&on_host(&settings.cni_conf_dir), &on_host(&settings.cni_bin_dir))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        settings: Settings,
    }

    fn parse(arguments: &[&str]) -> Result<Settings, String> {
        parse_at("192.0.2.1", arguments)
    }

    fn parse_at(host_ip: &str, arguments: &[&str]) -> Result<Settings, String> {
        let needed = ["agent", "--node-name=a", &format!("--host-ip={host_ip}")];
        let parsed = Arguments::try_parse_from(needed.iter().chain(arguments));
        parsed.map(|arguments| arguments.settings).map_err(|error| error.to_string())
    }

    #[test]
    fn a_node_has_an_address_that_others_can_send_to() {
        for good in ["192.0.2.1", "fd00::1", "2001:db8::1"] {
            assert_eq!(parse_at(good, &[]).unwrap().host_ip.to_string(), good);
        }
        for bad in ["fe80::1", "::", "0.0.0.0", "ff02::1", "fe80::1%eth0", "node-1"] {
            let error = parse_at(bad, &[]).unwrap_err();
            assert!(error.contains("--host-ip") && error.contains(bad) && error.contains("allowed: "), "{error}");
        }
        assert!(parse_at("fe80::1", &[]).unwrap_err().contains("link-local"));
    }

    #[test]
    fn a_domain_is_one_or_refused_by_name() {
        assert_eq!(parse(&[]).unwrap().dns_domain, None);
        let given = parse(&["--dns-domain=Portolan.internal."]).unwrap().dns_domain;
        assert_eq!(given.unwrap().to_string(), "portolan.internal");
        let error = parse(&["--dns-domain=no_domain"]).unwrap_err();
        assert!(error.contains("--dns-domain") && error.contains("\"no_domain\" was given; allowed: "), "{error}");
        assert!(parse(&["--dns-everyone-port=7794"]).unwrap_err().contains("--dns-domain"));
        assert!(parse(&["--dns-everyone-port=7794", "--dns-domain=portolan.internal"]).is_ok());
    }
}

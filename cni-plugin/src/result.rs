//! What ADD has given a pod where Portolan makes the cluster's own network: CNI's success result (specification 1.1.0, "Success").

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The interfaces, addresses and routes of a pod, as the newest version of the specification has them.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Attached {
    /// The host's end of the pod's link, then the pod's.
    pub interfaces: Vec<Interface>,
    /// The pod's addresses.
    pub ips: Vec<Ip>,
    /// The pod's routes.
    pub routes: Vec<Route>,
}

/// One end of a link.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC.
    pub mac: String,
    /// The network namespace that it is in; none if it is the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

/// An address of a pod.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Ip {
    /// With its prefix length.
    pub address: String,
    /// By whom the pod sends.
    pub gateway: IpAddr,
    /// Which of the interfaces has it.
    pub interface: usize,
}

/// A route of a pod.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Route {
    /// Where it leads.
    pub dst: String,
    /// By whom.
    pub gw: IpAddr,
}

impl Attached {
    /// The specification's result in the form of a version. Before 1.0.0 each address says of which IP version it is.
    pub(crate) fn to_json(&self, version: &str) -> Value {
        let ip = |ip: &Ip| {
            let mut value = json!({"address": ip.address, "gateway": ip.gateway, "interface": ip.interface});
            if version.starts_with("0.") {
                value["version"] = (if ip.gateway.is_ipv4() { "4" } else { "6" }).into();
            }
            value
        };
        let ips: Vec<Value> = self.ips.iter().map(ip).collect();
        json!({"cniVersion": version, "interfaces": self.interfaces, "ips": ips, "routes": self.routes, "dns": {}})
    }
}

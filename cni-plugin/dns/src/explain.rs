//! Why a name has the answer that it has, for people.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::reverse;
use crate::zone::{Data, Host, Zone};

/// What a zone says of a name to one pod.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Explanation {
    /// It is in none of the pod's networks: the cluster's DNS is asked.
    Elsewhere,
    /// It is in this network, where nobody has it: `NXDOMAIN`.
    Nobody {
        /// The network.
        network: String,
    },
    /// These pods of the network have it. Without pods, only longer names end in it.
    Pods {
        /// The network.
        network: String,
        /// Each pod that has it, and whether it is in the answer.
        pods: Vec<(Host, bool)>,
    },
    /// A service: these pods, at these ports.
    Services {
        /// The network.
        network: String,
        /// Each pod that is in the answer, and its port.
        pods: Vec<(Host, u16)>,
    },
    /// The address of this pod.
    Address {
        /// The network.
        network: String,
        /// The pod.
        pod: Box<Host>,
    },
    /// Several namespaces have the name, and the asking pod's doesn't.
    Ambiguous {
        /// The network.
        network: String,
        /// The namespaces.
        namespaces: Vec<String>,
    },
}

impl Zone {
    /// Explains a name (or an address) to the pod that would ask for it from `source` on `network`, by the rules of [`Zone::new`].
    pub fn explain(&self, network: &str, source: IpAddr, name: &str) -> Explanation {
        let name = match name.parse::<IpAddr>() {
            // The top of a zone of one address is its name.
            Ok(address) => reverse::apex(&IpNet::from(address)),
            Err(_) => name.trim_end_matches('.').to_ascii_lowercase(),
        };
        let network = network.to_ascii_lowercase();
        let Some(found) = self.find(&network, source, &name) else { return Explanation::Elsewhere };
        let network = found.network.to_owned();
        match found.data {
            Data::Missing => Explanation::Nobody { network },
            Data::Hosts { all, answered } => {
                let is_answered = |host: &Host| answered.iter().any(|one| std::ptr::eq(*one, host));
                Explanation::Pods {
                    network,
                    pods: all.into_iter().map(|host| (host.clone(), is_answered(host))).collect(),
                }
            }
            Data::Services(services) => {
                let pods = services.into_iter().map(|(host, port)| (host.clone(), port)).collect();
                Explanation::Services { network, pods }
            }
            Data::Address(host) => Explanation::Address { network, pod: Box::new(host.clone()) },
            Data::Ambiguous(namespaces) => {
                let namespaces = namespaces.into_iter().map(str::to_owned).collect();
                Explanation::Ambiguous { network, namespaces }
            }
        }
    }
}

//! What may pass at the ports of a network: sets of peers and of ports, for each port and direction. Ports without rules are open.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Dataplane, error::Result, nft};

/// What may pass at a network's ports on this node. A port that isn't here is open in both directions.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Filter {
    /// By the port's name ([`crate::port_name`]). The port need not be there (yet, or any more).
    pub ports: BTreeMap<String, PortFilter>,
}

/// What may pass at one port; `None` is all, an empty list nothing. Answers to what passed always pass.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct PortFilter {
    /// Which new traffic its pod gets.
    pub ingress: Option<Vec<Rule>>,
    /// Which new traffic its pod may send.
    pub egress: Option<Vec<Rule>>,
}

/// Lets pass what is from (or to) one of the peers and to one of the services.
#[derive(Clone, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Rule {
    /// The other side's addresses; `None` is whoever it is.
    pub peers: Option<Vec<IpNet>>,
    /// What it may be; `None` is any IP protocol.
    pub services: Option<BTreeSet<Service>>,
}

/// Destination ports of a protocol, from the first to the last.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Service {
    /// The protocol.
    pub protocol: Protocol,
    /// The first port.
    pub first: u16,
    /// The last port.
    pub last: u16,
}

/// A protocol that has ports.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

impl PortFilter {
    /// Whether all passes in both directions.
    pub fn is_open(&self) -> bool {
        self.ingress.is_none() && self.egress.is_none()
    }
}

impl Dataplane {
    /// Makes what may pass at a network's ports what the filter says, in one step: each packet meets the old rules or the new ones. Answers
    /// to what passed before go on passing. Where all ports are open nothing is left in the kernel.
    ///
    /// Needs the host's `nft`, unless there is nothing to set.
    ///
    /// # Errors
    /// [`crate::Error::NoNetwork`] when the network isn't set up here; what `nft` or the kernel refuses: then the old rules stay.
    pub async fn filter(&self, vni: u32, filter: &Filter) -> Result<()> {
        let namespace = self.namespace(vni)?;
        match nft::script(filter) {
            Some(script) => nft::run(self.programs(), namespace, script).await,
            None => nft::clear(self.programs(), namespace).await,
        }
    }
}

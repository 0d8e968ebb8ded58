//! What the executable and the agent say to each other: one line of JSON each way per connection.
//!
//! An executable of an older release may ask a newer agent: fields are only ever added, with a default.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{Attached, Failure};

/// What the container runtime asks for (`CNI_COMMAND`).
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Command {
    /// Plug a pod in.
    #[serde(rename = "ADD")]
    Add,
    /// Unplug a pod.
    #[serde(rename = "DEL")]
    Delete,
    /// Is the pod plugged in as it should be?
    #[serde(rename = "CHECK")]
    Check,
    /// Unplug all but the given attachments.
    #[serde(rename = "GC")]
    Collect,
    /// Can pods be plugged in?
    #[serde(rename = "STATUS")]
    Status,
    /// Which versions are there? Never reaches the agent.
    #[serde(rename = "VERSION")]
    Version,
}

/// A request to the agent.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// What to do.
    pub command: Command,
    /// The container (the pod's sandbox); empty for GC and STATUS.
    #[serde(default)]
    pub container: String,
    /// The pod's network namespace, as the host sees it; may be missing for DEL.
    #[serde(default)]
    pub netns: Option<String>,
    /// The primary interface, `eth0` as a rule.
    #[serde(default)]
    pub interface: String,
    /// The pod, if the runtime told it.
    #[serde(default)]
    pub pod: Option<PodName>,
    /// GC: what is still there, if the runtime told it.
    #[serde(default)]
    pub attachments: Option<Vec<Attachment>>,
    /// Whether no other plugin has given the pod its interface.
    #[serde(default)]
    pub primary: bool,
    /// ADD: which ports of the host lead to the pod.
    #[serde(default)]
    pub port_mappings: Vec<PortMapping>,
}

/// A port of the host that leads to the pod, as runtimes tell it (`runtimeConfig.portMappings`, CNI's conventions for well-known capabilities).
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The host's port.
    pub host_port: u16,
    /// The pod's.
    pub container_port: u16,
    /// Of which protocol.
    #[serde(default)]
    pub protocol: Transport,
    /// At which of the host's addresses; at all if none is named.
    #[serde(default, rename = "hostIP")]
    pub host_ip: Option<IpAddr>,
}

/// A protocol that has ports.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// RFC 9293.
    #[default]
    Tcp,
    /// RFC 768.
    Udp,
    /// RFC 9260.
    Sctp,
}

/// Which pod a container is for.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PodName {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID, if the runtime told it.
    #[serde(default)]
    pub uid: Option<String>,
}

/// A container's attachment to the network, as GC lists it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Attachment {
    /// The container.
    #[serde(rename = "containerID")]
    pub container: String,
    /// The primary interface.
    #[serde(rename = "ifname")]
    pub interface: String,
}

/// The agent's answer.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Answer {
    /// What went wrong; nothing if all went well.
    #[serde(default)]
    pub error: Option<Failure>,
    /// ADD where no other plugin has given the pod its interface: what it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<Attached>,
}

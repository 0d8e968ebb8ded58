//! ContainerNetwork, and what nodes say of it: NetworkNodeSlice, IPBlock, IPClaim.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::subnets::addresses;

/// One switch that spans all nodes.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, KubeSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "ContainerNetwork",
    plural = "containernetworks",
    shortname = "cnet",
    status = "ContainerNetworkStatus",
    derive = "Default",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Subnet","type":"string","jsonPath":".spec.subnets[0]"}"#,
    printcolumn = r#"{"name":"Second","type":"string","jsonPath":".spec.subnets[1]"}"#,
    printcolumn = r#"{"name":"VNI","type":"integer","jsonPath":".status.vni"}"#,
    printcolumn = r#"{"name":"Endpoints","type":"integer","jsonPath":".status.endpoints"}"#,
    printcolumn = r#"{"name":"IPv4-Free","type":"integer","jsonPath":".status.ipv4.free"}"#,
    printcolumn = r#"{"name":"IPv6-Free","type":"integer","jsonPath":".status.ipv6.free"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"IPv4-Used","type":"integer","jsonPath":".status.ipv4.used","priority":1}"#,
    printcolumn = r#"{"name":"IPv6-Used","type":"integer","jsonPath":".status.ipv6.used","priority":1}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].reason","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.subnets == oldSelf.subnets").message("subnets can't be changed once pods may have addresses: make another network"),
    validation = Rule::new("self.encryption == oldSelf.encryption").message("encryption can't be changed: make another network"),
    validation = Rule::new("!has(self.mtu) || self.mtu >= 1280 || self.subnets.all(s, isCIDR(s) && cidr(s).ip().family() == 4)")
        .message("mtu is 1280 or more where a subnet is an IPv6 CIDR (RFC 8200, section 5)"),
)]
pub struct ContainerNetworkSpec {
    /// The network's subnets in CIDR form: one IPv4 subnet (`10.32.0.0/16`), one IPv6 subnet (`fd32::/64`), or one of each, in any order.
    #[schemars(length(min = 1, max = 2), inner(length(max = 43)))]
    #[x_kube(
        validation = Rule::new("self.all(s, isCIDR(s) && cidr(s).masked() == cidr(s))")
            .message("each subnet is a CIDR without host bits, such as 10.32.0.0/16 or fd32::/64"),
        validation = Rule::new("self.all(s, !isCIDR(s) || (cidr(s).ip().family() == 4 ? cidr(s).prefixLength() >= 8 && cidr(s).prefixLength() <= 29 : cidr(s).prefixLength() >= 48 && cidr(s).prefixLength() <= 120))")
            .message("the prefix of an IPv4 subnet is from /8 to /29, that of an IPv6 subnet from /48 to /120"),
        validation = Rule::new("self.size() != 2 || !isCIDR(self[0]) || !isCIDR(self[1]) || cidr(self[0]).ip().family() != cidr(self[1]).ip().family()")
            .message("two subnets are one IPv4 CIDR and one IPv6 CIDR"),
    )]
    pub subnets: Vec<String>,
    /// The VXLAN network identifier, 1 to 16777215 (RFC 7348); allocated if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_215))]
    pub vni: Option<u32>,
    /// The MTU of the pods' interfaces in bytes; the underlay's less 50 if not given, or less 110 with encryption.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 576, max = 9000))]
    pub mtu: Option<u32>,
    /// Nodes answer ARP for known endpoints themselves. Off by default: gratuitous ARP and duplicate detection need broadcasts.
    #[serde(default)]
    pub neighbor_suppression: bool,
    /// Where IP multicast goes: to all pods (`Flood`), or only to those that joined the group by IGMP or MLD (`Snooping`; RFC 4541).
    #[serde(default)]
    pub multicast: Multicast,
    /// How packets between nodes are encrypted. A pod doesn't start on a node whose kernel has no WireGuard if its network has `WireGuard`.
    #[serde(default)]
    pub encryption: Encryption,
    /// Gives each subnet a gateway, its first host address, by which pods reach what is outside of their networks: each node sends it on as its
    /// own. A pod goes there that asks for it (`default-route` in its annotation).
    #[serde(default, rename = "egressNAT")]
    pub egress_nat: bool,
}

/// How a network's packets are encrypted between nodes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Encryption {
    /// Not at all.
    #[default]
    None,
    /// By the kernel's WireGuard.
    WireGuard,
}

/// Where a network's IP multicast goes.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub enum Multicast {
    /// To all pods.
    #[default]
    Flood,
    /// To those pods that joined the group.
    Snooping,
}

/// What is known of a network.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerNetworkStatus {
    /// The VXLAN network identifier in use. Nodes use a network only when this is set and `Ready` is not `False`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// Pods plugged in, over all nodes.
    #[serde(default)]
    pub endpoints: i64,
    /// The addresses of the IPv4 subnet, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<AddressCounts>,
    /// The addresses of the IPv6 subnet, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<AddressCounts>,
    /// The newest generation of the nodes' keys, if the network is encrypted; the same for all networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<KeyGeneration>,
    /// `Ready`, and what stands in its way; `NamesInjected`, and which pods don't get the network's names; `MTUMismatch`, and
    /// which paths between nodes carry less than pods may send; `IPFamilyMismatch`, if nodes don't reach each other as their addresses
    /// are of different IP families; with `egressNAT` `EgressReady`, and why there is no way outside.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// The newest generation of the nodes' keys.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct KeyGeneration {
    /// Its number. Nodes make a key of it, and drop the former one when nobody needs it any more.
    pub generation: u32,
    /// When it began. A time long ago makes the next one begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
}

/// How many addresses of a subnet are somebody's.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressCounts {
    /// Addresses that pods have, and those that are kept for a StatefulSet's pods (IPClaim).
    pub used: i64,
    /// All others that a pod could have, be they in a node's block or not.
    pub free: i64,
}

/// The endpoints of one network on one node, written only by that node's agent. Named `<network>.<node>`, owned by the Node.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "NetworkNodeSlice",
    plural = "networknodeslices",
    derive = "Default",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Network","type":"string","jsonPath":".spec.network"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.node"}"#,
    printcolumn = r#"{"name":"VTEP","type":"string","jsonPath":".spec.vtep"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct NetworkNodeSliceSpec {
    /// The network.
    pub network: String,
    /// The node.
    pub node: String,
    /// The node's VXLAN tunnel endpoint: its address on the underlay, IPv4 or IPv6.
    pub vtep: String,
    /// The pods of this node that are plugged in.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
    /// The paths to other nodes that carry less than this node's pods may send; none if no such path is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_mtu: Option<PathMtu>,
    /// By which keys the node is to be reached, if the network is encrypted; the same in all slices of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<NodeEncryption>,
    /// Why the network's pods can't reach the outside from this node, though the network has `egressNAT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_problem: Option<String>,
}

/// What a node says of its keys.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeEncryption {
    /// The keys by which it can be reached: one, or two while they are rotated.
    #[serde(default)]
    pub keys: Vec<NodeKey>,
    /// The oldest generation of keys by which it still sends packets to any node.
    #[serde(default)]
    pub sends: u32,
}

/// A node's key of one generation. Keys of the same generation belong together.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeKey {
    /// The generation.
    pub generation: u32,
    /// WireGuard's public key in base64.
    pub public_key: String,
}

/// Paths between nodes that are too small for a network.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PathMtu {
    /// What a path has to carry, in bytes with the outer IP header: the largest MTU of the node's pods, and 50 for VXLAN (70 between IPv6
    /// addresses); with encryption 60 (80) more, and up to 15 by which packets are filled up.
    pub needed: u32,
    /// The paths, the smallest first; sixteen at most.
    #[serde(default)]
    pub small: Vec<SmallPath>,
    /// So many others there are at least: a power of two, or none.
    #[serde(default)]
    pub more: u32,
}

/// A path to another node.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SmallPath {
    /// The other node.
    pub node: String,
    /// The largest packet that gets there, in bytes with the outer IP header.
    pub mtu: u32,
}

/// One pod's port on a network.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Its address, without prefix: an IPv4 address, or an IPv6 one where the network has no IPv4.
    pub address: String,
    /// Its IPv6 address beside an IPv4 one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_address: Option<String>,
    /// MAC address, `02:…`.
    pub mac: String,
    /// The interface's name in the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<String>,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// The pod's labels, by which NetworkPolicies choose it. Absent if they aren't known: then only those choose it that choose all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// Name of the workload the pod belongs to (StatefulSet, Deployment, DaemonSet, Job).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The pod's `Ready` condition: only ready endpoints are in DNS answers.
    #[serde(default)]
    pub ready: bool,
    /// More names of the pod (annotation `portolan.dev/dns-names`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// The pod's named ports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<NamedPort>,
    /// In DNS answers though not ready (annotation `portolan.dev/publish-not-ready`); never while it is being deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub publish_not_ready: bool,
    /// Answered alone, with its like, to pods of its own node (annotation `portolan.dev/prefer-same-node`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prefer_same_node: bool,
    /// Doesn't ask Portolan's DNS server, and not by its own choice: it was made while admission could not be reached.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub not_admitted: bool,
}

impl Endpoint {
    /// Its addresses, IPv4 first; what can't be read is left out.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        addresses(&self.address, self.second_address.as_deref())
    }
}

/// A port of a pod that has a name.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NamedPort {
    /// Its name.
    pub name: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Its number.
    pub port: u16,
}

/// A block of a network's subnet that one node allocates from, claimed by atomic create. Named `<network>-<address with dashes>`, an IPv6
/// address having eight groups of four digits.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "IPBlock",
    plural = "ipblocks",
    derive = "Default",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Network","type":"string","jsonPath":".spec.network"}"#,
    printcolumn = r#"{"name":"Block","type":"string","jsonPath":".spec.cidr"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.node"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct IPBlockSpec {
    /// The network.
    pub network: String,
    /// The block in CIDR form.
    pub cidr: String,
    /// The node that allocates from it.
    pub node: String,
}

/// A sticky address, or one of each family: it follows the pod by its identity. Named `<network>.<namespace>.<pod>`.
#[derive(CustomResource, Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[kube(
    group = "portolan.dev",
    version = "v1alpha1",
    kind = "IPClaim",
    plural = "ipclaims",
    derive = "Default",
    derive = "PartialEq",
    printcolumn = r#"{"name":"Network","type":"string","jsonPath":".spec.network"}"#,
    printcolumn = r#"{"name":"Address","type":"string","jsonPath":".spec.address"}"#,
    printcolumn = r#"{"name":"Second","type":"string","jsonPath":".spec.secondAddress"}"#,
    printcolumn = r#"{"name":"Namespace","type":"string","jsonPath":".spec.namespace"}"#,
    printcolumn = r#"{"name":"Pod","type":"string","jsonPath":".spec.pod"}"#,
    printcolumn = r#"{"name":"Node","type":"string","jsonPath":".spec.node"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct IPClaimSpec {
    /// The network.
    pub network: String,
    /// The address, without prefix: an IPv4 address, or an IPv6 one where the network has no IPv4.
    pub address: String,
    /// The IPv6 address beside an IPv4 one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_address: Option<String>,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// Name of the StatefulSet that gives the pod its identity.
    pub owner: String,
    /// UID of that StatefulSet: the claim goes when it is gone.
    pub owner_uid: String,
    /// The node that the pod was started on last. If its Node object is gone, the pod may still run there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Nodes that it was started on before and whose Node object was gone when it was started elsewhere: it may still run there for a while.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former_nodes: Vec<String>,
}

impl IPClaimSpec {
    /// The nodes that the pod may run on.
    pub fn nodes(&self) -> impl Iterator<Item = &String> {
        self.node.iter().chain(&self.former_nodes)
    }

    /// The addresses, IPv4 first; what can't be read is left out.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        addresses(&self.address, self.second_address.as_deref())
    }
}

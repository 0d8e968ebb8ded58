//! ContainerNetwork, and what nodes say of it: NetworkNodeSlice, IPBlock, IPClaim.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
    printcolumn = r#"{"name":"VNI","type":"integer","jsonPath":".status.vni"}"#,
    printcolumn = r#"{"name":"Endpoints","type":"integer","jsonPath":".status.endpoints"}"#,
    printcolumn = r#"{"name":"Ready","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].status"}"#,
    printcolumn = r#"{"name":"Reason","type":"string","jsonPath":".status.conditions[?(@.type=='Ready')].reason","priority":1}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.subnets == oldSelf.subnets").message("subnets can't be changed once pods may have addresses: make another network"),
)]
pub struct ContainerNetworkSpec {
    /// The network's subnets in CIDR form (`10.32.0.0/16`). One IPv4 subnet for now.
    #[schemars(length(min = 1, max = 1))]
    #[x_kube(
        validation = Rule::new("self.all(s, isCIDR(s) && cidr(s).ip().family() == 4 && cidr(s).masked() == cidr(s) && cidr(s).prefixLength() >= 8 && cidr(s).prefixLength() <= 29)")
            .message("each subnet is an IPv4 CIDR without host bits and a prefix from /8 to /29, such as 10.32.0.0/16"),
    )]
    pub subnets: Vec<String>,
    /// The VXLAN network identifier, 1 to 16777215 (RFC 7348); allocated if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 16_777_215))]
    pub vni: Option<u32>,
    /// The MTU of the pods' interfaces in bytes; the underlay's less 50 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 576, max = 9000))]
    pub mtu: Option<u32>,
    /// Nodes answer ARP for known endpoints themselves. Off by default: gratuitous ARP and duplicate detection need broadcasts.
    #[serde(default)]
    pub neighbor_suppression: bool,
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
    /// `Ready`, and what stands in its way; `NamesInjected`, and which pods don't get the network's names.
    #[serde(default)]
    pub conditions: Vec<Condition>,
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
    /// The node's VXLAN tunnel endpoint: its address on the underlay.
    pub vtep: String,
    /// The pods of this node that are plugged in.
    #[serde(default)]
    pub endpoints: Vec<Endpoint>,
}

/// One pod's port on a network.
#[derive(Clone, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// IPv4 address, without prefix.
    pub address: String,
    /// MAC address, `02:…`.
    pub mac: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
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

/// A block of a network's subnet that one node allocates from, claimed by atomic create. Named `<network>-<address with dashes>`.
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

/// A sticky address: it follows the pod by its identity. Named `<network>.<namespace>.<pod>`.
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
    printcolumn = r#"{"name":"Namespace","type":"string","jsonPath":".spec.namespace"}"#,
    printcolumn = r#"{"name":"Pod","type":"string","jsonPath":".spec.pod"}"#,
    printcolumn = r#"{"name":"Age","type":"date","jsonPath":".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase")]
pub struct IPClaimSpec {
    /// The network.
    pub network: String,
    /// The IPv4 address, without prefix.
    pub address: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub pod: String,
    /// Name of the StatefulSet that gives the pod its identity.
    pub owner: String,
    /// UID of that StatefulSet: the claim goes when it is gone.
    pub owner_uid: String,
}

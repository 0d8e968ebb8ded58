//! The operator: validates ContainerNetworks and gives them their VNI, signs the node agents' certificates, tells annotated
//! pods where names are answered and which addresses they have, says what is wrong in policies, and clears away what nobody owns any more.

pub mod authority;
pub mod garbage;
pub mod metrics;
pub mod network;
pub mod network_status;
pub mod policies;
pub mod uninstall;
pub mod webhook;

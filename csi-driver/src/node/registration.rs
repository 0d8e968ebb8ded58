//! The two sockets that the kubelet talks to: CSI, and the one by which it learns of it.
//!
//! Neither is removed at the end: a kubelet that sees the registration socket go forgets the driver, though the process is only
//! being replaced. The next one makes them anew, which makes the kubelet register it again.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use portolan_crds::DRIVER;
use portolan_zfs::Zfs;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::csi::Service;
use super::{Node, socket};
use crate::identity::Identity;
use crate::proto::csi::{identity_server::IdentityServer, node_server::NodeServer};
use crate::proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
    registration_server::{self, RegistrationServer},
};
use crate::volume;

/// What the kubelet is told.
struct Registration {
    endpoint: PathBuf,
}

#[tonic::async_trait]
impl registration_server::Registration for Registration {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(PluginInfo {
            r#type: "CSIPlugin".to_owned(),
            name: DRIVER.to_owned(),
            endpoint: self.endpoint.to_string_lossy().into_owned(),
            supported_versions: vec!["1.0.0".to_owned()],
        }))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            tracing::info!("the kubelet has registered the driver");
        } else {
            tracing::warn!(error = status.error, "the kubelet has not registered the driver; it tries again");
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// Serves CSI and its registration until `shutdown`.
pub(super) async fn serve<Z: Zfs>(node: Arc<Node<Z>>, shutdown: CancellationToken) -> anyhow::Result<()> {
    let endpoint = volume::plugin_dir(&node.kubelet_dir).join("csi.sock");
    let register = node.kubelet_dir.join("plugins_registry").join(format!("{DRIVER}-reg.sock"));
    let csi = socket::listen(&node.mounts, &endpoint).with_context(|| format!("can't listen at {}", endpoint.display()))?;
    let csi = Server::builder()
        .add_service(IdentityServer::new(Identity))
        .add_service(NodeServer::new(Service(node.clone())))
        .serve_with_incoming_shutdown(csi, shutdown.clone().cancelled_owned());
    // Only now: the kubelet calls back as soon as it sees this one.
    let registration = socket::listen(&node.mounts, &register).with_context(|| format!("can't listen at {}", register.display()))?;
    let registration = Server::builder()
        .add_service(RegistrationServer::new(Registration { endpoint }))
        .serve_with_incoming_shutdown(registration, shutdown.cancelled_owned());
    tokio::try_join!(csi, registration).context("a gRPC server ended")?;
    Ok(())
}

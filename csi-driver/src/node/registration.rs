//! The two sockets that the kubelet talks to: CSI, and the one by which it learns of it.
//!
//! Neither is removed at the end: a kubelet that sees the registration socket go forgets the driver, though the process is only
//! being replaced. The next one makes them anew, which makes the kubelet register it again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use portolan_crds::DRIVER;
use portolan_zfs::Zfs;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::Node;
use super::csi::Service;
use crate::identity::Identity;
use crate::proto::csi::{identity_server::IdentityServer, node_server::NodeServer};
use crate::proto::registration::{
    InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse,
    registration_server::{self, RegistrationServer},
};
use crate::{socket, volume};

/// How often a missing pool is looked for.
const LOOK_FOR_POOL: Duration = Duration::from_secs(3);

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
    let csi = socket::listen(&node.mounts.here(&endpoint))
        .with_context(|| format!("can't listen at {}", endpoint.display()))?;
    let csi = Server::builder()
        .add_service(IdentityServer::new(Identity))
        .add_service(NodeServer::new(Service(node.clone())))
        .serve_with_incoming_shutdown(csi, shutdown.clone().cancelled_owned());
    let registration = async {
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = pool_present(&node) => {}
        }
        let sockets = socket::listen(&node.mounts.here(&register));
        let sockets = sockets.with_context(|| format!("can't listen at {}", register.display()))?;
        let server = Server::builder().add_service(RegistrationServer::new(Registration { endpoint }));
        server
            .serve_with_incoming_shutdown(sockets, shutdown.cancelled())
            .await
            .context("the registration server ended")
    };
    tokio::try_join!(async { csi.await.context("the CSI server ended") }, registration)?;
    Ok(())
}

/// Returns when there is a pool. A node without one would be refused (see `node_get_info`), and after some refusals the kubelet
/// waits for minutes between its attempts.
async fn pool_present<Z: Zfs>(node: &Node<Z>) {
    while let Err(error) = node.zfs.space(&node.pool).await {
        tracing::debug!(%error, "no pool yet: not registering with the kubelet");
        tokio::time::sleep(LOOK_FOR_POOL).await;
    }
}

//! `portolan-operator`: see the library.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use kube::Client;
use portolan_operator::authority::{self, Authority};
use portolan_operator::metrics::Metrics;
use portolan_operator::{garbage, network, network_status, policies, uninstall, webhook};
use portolan_runtime::address::everywhere;
use portolan_runtime::client::patient;
use portolan_runtime::events::Events;
use portolan_runtime::http::Health;
use portolan_runtime::leader;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

const COMPONENT: &str = "portolan-operator";

/// Validates ContainerNetworks, signs node certificates, and gives annotated pods their DNS settings.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    /// Port of the webhook (HTTPS).
    #[arg(long, env = "WEBHOOK_PORT", default_value_t = 9443)]
    webhook_port: u16,
    /// Port of /healthz, /readyz and /metrics.
    #[arg(long, env = "HTTP_PORT", default_value_t = 8080)]
    http_port: u16,
    /// Name of the Service in front of the webhook.
    #[arg(long, env = "WEBHOOK_SERVICE", default_value = "portolan-webhook")]
    webhook_service: String,
    /// Name of the MutatingWebhookConfiguration that this operator keeps its authority in.
    #[arg(long, env = "WEBHOOK_CONFIGURATION", default_value = "portolan")]
    webhook_configuration: String,
    /// The user who may ask for node certificates; the service account portolan-storage of this namespace by default.
    #[arg(long, env = "NODE_SERVICE_ACCOUNT")]
    node_service_account: Option<String>,
    /// Address of the cluster's DNS server; that of Service kube-system/kube-dns by default.
    #[arg(long, env = "CLUSTER_DNS")]
    cluster_dns: Option<IpAddr>,
    /// The cluster's domain.
    #[arg(long, env = "CLUSTER_DOMAIN", default_value = "cluster.local")]
    cluster_domain: String,
    /// How old the nodes' keys for encrypted networks get before new ones are made, in hours; 0 for ever.
    #[arg(long, env = "KEY_ROTATION_HOURS", default_value_t = 720)]
    key_rotation_hours: u32,
}

#[derive(Subcommand)]
enum Command {
    /// Take Portolan out of every node's container runtime, then end. The chart runs this before it is uninstalled.
    Uninstall,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    portolan_runtime::init_logging(COMPONENT);
    match run(arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> anyhow::Result<()> {
    let stop = portolan_runtime::shutdown();
    let namespace = portolan_runtime::namespace();
    let client = Client::try_default().await.context("can't find out how to reach the Kubernetes API")?;
    let client = patient(client);
    if let Some(Command::Uninstall) = arguments.command {
        return uninstall::run(client, &namespace).await.map_err(anyhow::Error::from);
    }

    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let health = Health::new();
    let http = portolan_runtime::http::serve(
        everywhere(arguments.http_port),
        health.clone(),
        Arc::new(registry),
        stop.clone(),
    );

    let work = async {
        let authority = tokio::select! {
            authority = authority::load_or_create(&client, &namespace) => Arc::new(authority?),
            () = stop.cancelled() => return Ok(()),
        };
        let listening = CancellationToken::new();
        let webhook = webhook::run(
            client.clone(),
            Arc::clone(&authority),
            webhook_settings(&arguments, &namespace, everywhere(arguments.webhook_port)),
            metrics.clone(),
            listening.clone(),
            stop.clone(),
        );
        let registration = async {
            listening.cancelled().await;
            let name = &arguments.webhook_configuration;
            let tell = |registered| health.set_ready(registered);
            webhook::keep_registered(client.clone(), name, authority.certificate(), tell).await;
        };
        let registration = async {
            stop.run_until_cancelled(registration).await;
            anyhow::Ok(())
        };
        let webhook = async { webhook.await.map_err(anyhow::Error::from) };
        let lead = lead(&arguments, &client, &namespace, &authority, &metrics, &stop);
        tokio::try_join!(webhook, lead, registration).map(|_| ())
    };
    // Each ends by itself when asked to: the leader gives its Lease back. A failure of one ends all.
    let http = async { http.await.map_err(anyhow::Error::from) };
    tokio::try_join!(work, http).map(|_| ())
}

fn webhook_settings(arguments: &Arguments, namespace: &str, address: SocketAddr) -> webhook::Settings {
    let service = format!("{}.{namespace}", arguments.webhook_service);
    webhook::Settings {
        address,
        names: vec![format!("{service}.svc"), format!("{service}.svc.{}", arguments.cluster_domain)],
        cluster_dns: arguments.cluster_dns,
        cluster_domain: arguments.cluster_domain.clone(),
    }
}

/// The work of which there must be one at a time.
async fn lead(
    arguments: &Arguments,
    client: &Client,
    namespace: &str,
    authority: &Arc<Authority>,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let identity = std::env::var("POD_NAME").unwrap_or_else(|_| format!("{COMPONENT}-{}", std::process::id()));
    let account = arguments
        .node_service_account
        .clone()
        .unwrap_or_else(|| format!("system:serviceaccount:{namespace}:portolan-storage"));
    let hours = u64::from(arguments.key_rotation_hours);
    let rotation = (hours > 0).then(|| Duration::from_secs(hours * 3600));
    let events = Events::new(client.clone(), COMPONENT);
    leader::run(client.clone(), namespace, COMPONENT, &identity, stop.clone(), |leading| async move {
        tokio::join!(
            network::run(client.clone(), events.clone(), metrics.clone(), rotation, leading.clone()),
            authority::run(
                client.clone(),
                Arc::clone(authority),
                account,
                events.clone(),
                metrics.clone(),
                leading.clone()
            ),
            policies::run(client.clone(), events, leading.clone()),
            network_status::run(client.clone(), leading.clone()),
            garbage::run(client.clone(), leading),
        );
    })
    .await?;
    Ok(())
}

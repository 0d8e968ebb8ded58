//! What a node's agent counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// The node's metrics.
pub(super) struct Metrics {
    pub(super) handoffs: Counter,
    pub(super) failures: Counter,
    pub(super) received: Counter,
    pub(super) downtime: Histogram,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            handoffs: Counter::default(),
            failures: Counter::default(),
            received: Counter::default(),
            downtime: Histogram::new([0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0]),
        };
        registry.register("handoffs", "Volumes that this node has taken over", metrics.handoffs.clone());
        registry.register(
            "volume_step_failures",
            "Steps of volumes that failed on this node",
            metrics.failures.clone(),
        );
        let help = "ZFS streams that this node has received";
        registry.register_with_unit("transfer_received", help, Unit::Bytes, metrics.received.clone());
        let help = "From unmounted at the source to writable on this node";
        registry.register_with_unit("handoff_downtime", help, Unit::Seconds, metrics.downtime.clone());
        metrics
    }
}

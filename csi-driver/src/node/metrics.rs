//! What a node's agent counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// The node's metrics.
pub(super) struct Metrics {
    pub(super) handoffs: Counter,
    pub(super) failures: Counter,
    pub(super) received: Counter,
    pub(super) downtime: Histogram,
    pub(super) pool_available: Gauge,
    pub(super) pool_capacity: Gauge,
    pub(super) pool_healthy: Gauge,
    pub(super) orphans: Gauge,
    pub(super) orphan_bytes: Gauge,
}

impl Metrics {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            handoffs: Counter::default(),
            failures: Counter::default(),
            received: Counter::default(),
            downtime: Histogram::new([0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0]),
            pool_available: Gauge::default(),
            pool_capacity: Gauge::default(),
            pool_healthy: Gauge::default(),
            orphans: Gauge::default(),
            orphan_bytes: Gauge::default(),
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
        let help = "Free in the pool; none if it can't be used";
        registry.register_with_unit("pool_available", help, Unit::Bytes, metrics.pool_available.clone());
        let help = "Room of the pool in all";
        registry.register_with_unit("pool_capacity", help, Unit::Bytes, metrics.pool_capacity.clone());
        registry.register("pool_healthy", "1 if all devices of the pool work", metrics.pool_healthy.clone());
        let help = "Datasets, snapshots, mounts and directories of ours without an object";
        registry.register("orphans", help, metrics.orphans.clone());
        let help = "What those use";
        registry.register_with_unit("orphan", help, Unit::Bytes, metrics.orphan_bytes.clone());
        metrics
    }
}

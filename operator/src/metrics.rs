//! The operator's own metrics.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

/// What was decided about a request.
#[derive(Clone, Copy, Debug, EncodeLabelValue, Eq, Hash, PartialEq)]
pub enum Decision {
    /// A certificate was signed, or a pod was changed.
    Granted,
    /// A certificate was denied.
    Denied,
    /// Nothing was to be done.
    Unchanged,
    /// The attempt failed and will be made again, if it is ours to make.
    Failed,
}

/// Labels of the counters.
#[derive(Clone, Copy, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
pub struct Outcome {
    /// What was decided.
    pub decision: Decision,
}

/// The counters; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    certificates: Family<Outcome, Counter>,
    admissions: Family<Outcome, Counter>,
    network_passes: Family<Outcome, Counter>,
}

impl Metrics {
    /// Counters at zero, known to `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "portolan_certificate_requests",
            "Certificate signing requests of node agents",
            metrics.certificates.clone(),
        );
        registry.register("portolan_admission_requests", "Pods seen by the webhook", metrics.admissions.clone());
        registry.register(
            "portolan_network_passes",
            "Passes over all ContainerNetworks",
            metrics.network_passes.clone(),
        );
        metrics
    }

    /// Counts a CertificateSigningRequest.
    pub fn certificate(&self, decision: Decision) {
        self.certificates.get_or_create(&Outcome { decision }).inc();
    }

    /// Counts a pod that the webhook was asked about.
    pub fn admission(&self, decision: Decision) {
        self.admissions.get_or_create(&Outcome { decision }).inc();
    }

    /// Counts a pass of the network controller.
    pub fn network_pass(&self, decision: Decision) {
        self.network_passes.get_or_create(&Outcome { decision }).inc();
    }
}

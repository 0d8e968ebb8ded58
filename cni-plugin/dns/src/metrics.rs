//! What the servers of a node count, in the names of Prometheus.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::{counter::Counter, family::Family, histogram::Histogram};
use prometheus_client::registry::{Registry, Unit};

use crate::wire;

/// Upper bounds in seconds: own answers take microseconds, forwarded ones up to the patience with an upstream.
const BUCKETS: [f64; 12] = [0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 2.0, 5.0];

/// Counters that all servers of a node share; a clone counts into the same ones.
#[derive(Clone, Debug)]
pub struct Metrics {
    queries: Family<Answered, Counter>,
    duration: Family<Timed, Histogram, fn() -> Histogram>,
    dropped: Family<Dropped, Counter>,
    cache: Family<Looked, Counter>,
    upstream: Family<Asked, Counter>,
}

/// Where an answer came from.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Source {
    /// The zone.
    Own,
    /// The cache or an upstream.
    Forwarded,
}

/// Why a packet got no answer.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Reason {
    /// Its pod sends too many.
    Rate,
    /// It is no query.
    Malformed,
    /// Its pod has too many connections open.
    Connections,
}

/// What was there for a query that isn't ours to answer.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Look {
    Hit,
    Stale,
    Miss,
    /// The same was being asked upstream already.
    Merged,
}

/// How an upstream did.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(crate) enum Outcome {
    Answered,
    /// It said that it can't tell.
    Refused,
    /// It could not be asked.
    Failed,
    Timeout,
}

/// Labels' values, and what the log says, are the variants' names in lower case.
macro_rules! in_lower_case {
    ($($label:ty),+) => {$(
        impl fmt::Display for $label {
            fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str(&format!("{self:?}").to_ascii_lowercase())
            }
        }

        impl EncodeLabelValue for $label {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
                self.to_string().encode(encoder)
            }
        }
    )+};
}

in_lower_case!(Source, Reason, Look, Outcome);

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Answered {
    network: String,
    source: Source,
    r#type: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Timed {
    source: Source,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Dropped {
    network: String,
    reason: Reason,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Looked {
    result: Look,
}

#[derive(Clone, Debug, EncodeLabelSet, Eq, Hash, PartialEq)]
struct Asked {
    server: String,
    result: Outcome,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            queries: Family::default(),
            duration: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
            dropped: Family::default(),
            cache: Family::default(),
            upstream: Family::default(),
        }
    }
}

impl Metrics {
    /// Adds the counters to a registry, under `dns_…`.
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("dns");
        registry.register("queries", "Queries that were answered", self.queries.clone());
        let help = "Time from a query to its answer";
        registry.register_with_unit("duration", help, Unit::Seconds, self.duration.clone());
        registry.register("dropped", "Packets and connections that got no answer", self.dropped.clone());
        registry.register("cache", "What the cache of forwarded answers had", self.cache.clone());
        registry.register("upstream", "Questions to the servers that know other names", self.upstream.clone());
    }

    pub(crate) fn answered(&self, network: &str, source: Source, answer: &[u8], took: Duration) {
        let (r#type, result) = (type_of(answer), result_of(answer));
        self.queries.get_or_create(&Answered { network: network.to_owned(), source, r#type, result }).inc();
        self.duration.get_or_create(&Timed { source }).observe(took.as_secs_f64());
    }

    pub(crate) fn dropped(&self, network: &str, reason: Reason) {
        self.dropped.get_or_create(&Dropped { network: network.to_owned(), reason }).inc();
    }

    pub(crate) fn looked(&self, result: Look) {
        self.cache.get_or_create(&Looked { result }).inc();
    }

    pub(crate) fn asked(&self, server: SocketAddr, result: Outcome) {
        self.upstream.get_or_create(&Asked { server: server.to_string(), result }).inc();
    }
}

/// The type of a message's question; those that nobody needs to tell apart are `other`, so that a pod can't make up labels.
pub(crate) fn type_of(message: &[u8]) -> &'static str {
    match wire::question_type(message) {
        None => "none",
        Some(1) => "A",
        Some(28) => "AAAA",
        Some(12) => "PTR",
        Some(33) => "SRV",
        Some(16) => "TXT",
        Some(6) => "SOA",
        Some(255) => "ANY",
        Some(_) => "other",
    }
}

/// What an answer says; `nodata` is a name that is there without records of the type (RFC 2308, 2.2).
pub(crate) fn result_of(answer: &[u8]) -> &'static str {
    match (wire::response_code(answer), wire::answers(answer)) {
        (Some(0), Some(0)) if wire::is_truncated(answer) => "truncated",
        (Some(0), Some(0)) => "nodata",
        (Some(0), _) => "noerror",
        (Some(1), _) => "formerr",
        (Some(2), _) => "servfail",
        (Some(3), _) => "nxdomain",
        (Some(4), _) => "notimp",
        (Some(5), _) => "refused",
        _ => "other",
    }
}

//! CNI's error result.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What went wrong, as the container runtime is told.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Failure {
    /// The code: below 100 the specification's own, from 100 the plugin's.
    pub code: u32,
    /// What went wrong, in one sentence.
    pub msg: String,
    /// Where to look, or why.
    #[serde(default)]
    pub details: String,
}

impl Failure {
    /// The configuration's CNI version isn't supported.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// An environment variable is missing or wrong.
    pub const INVALID_ENVIRONMENT: u32 = 4;
    /// The configuration could not be read.
    pub const INPUT: u32 = 5;
    /// The configuration is not JSON of the right form.
    pub const DECODE: u32 = 6;
    /// The configuration is wrong.
    pub const INVALID_CONFIG: u32 = 7;
    /// A passing state: the runtime should try again later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: the plugin can't serve ADD requests.
    pub const NOT_AVAILABLE: u32 = 50;
    /// The pod's annotation is wrong, or names a network that isn't there.
    pub const ANNOTATION: u32 = 100;
    /// No address is left on a network.
    pub const NO_ADDRESS: u32 = 101;
    /// The node could not set the port up.
    pub const SETUP: u32 = 102;
    /// CHECK: the pod isn't plugged in as it should be.
    pub const NOT_PLUGGED: u32 = 103;

    /// A failure with the place to look at.
    pub fn new(code: u32, msg: impl Into<String>, details: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: details.into() }
    }

    /// A failure of an input: its field, what was given and what is allowed.
    pub(crate) fn input(code: u32, field: &str, given: &str, allowed: &str) -> Self {
        Self::new(code, format!("{field}: {given:?} was given; allowed: {allowed}"), "")
    }

    /// The specification's error result.
    pub(crate) fn to_json(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "code": self.code, "msg": self.msg, "details": self.details })
    }
}

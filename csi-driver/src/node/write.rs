//! What a node writes into a volume's status beside the events of the handoff.

use portolan_crds::{PortableVolumeStatus, condition};
use portolan_runtime::conditions;

pub(crate) use crate::write::{WriteError, event, is_conflict, now, status};

use crate::quantity::Human;

pub(crate) fn not_ready(status: &mut PortableVolumeStatus, reason: &str, message: &str) -> bool {
    conditions::set(&mut status.conditions, condition::READY, condition::FALSE, reason, message, None)
}

pub(crate) fn used(status: &mut PortableVolumeStatus, bytes: i64) {
    status.used_bytes = Some(bytes);
    status.used = Some(Human(bytes).to_string());
}

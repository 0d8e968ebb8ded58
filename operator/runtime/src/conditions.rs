//! Conditions of a status.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// Sets the condition of type `type_`. True if anything changed; `lastTransitionTime` moves only when `status` does.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    status: &str,
    reason: &str,
    message: &str,
    generation: Option<i64>,
) -> bool {
    let mut wanted = Condition {
        last_transition_time: Time(jiff::Timestamp::now()),
        message: message.to_owned(),
        observed_generation: generation,
        reason: reason.to_owned(),
        status: status.to_owned(),
        type_: type_.to_owned(),
    };
    let Some(present) = conditions.iter_mut().find(|condition| condition.type_ == type_) else {
        conditions.push(wanted);
        return true;
    };
    if present.status == wanted.status {
        wanted.last_transition_time = present.last_transition_time.clone();
    }
    let changed = *present != wanted;
    *present = wanted;
    changed
}

/// The condition of type `type_`, if there is one.
pub fn find<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_stays_is_no_change() {
        let mut conditions = Vec::new();
        assert!(set(&mut conditions, "Ready", "False", "Waiting", "for a node", Some(1)));
        assert!(!set(&mut conditions, "Ready", "False", "Waiting", "for a node", Some(1)));
        assert_eq!(conditions.len(), 1);
    }

    #[test]
    fn the_transition_time_moves_with_the_status_only() {
        let mut conditions = Vec::new();
        set(&mut conditions, "Ready", "False", "Waiting", "for a node", None);
        conditions[0].last_transition_time = Time(jiff::Timestamp::UNIX_EPOCH);
        assert!(set(&mut conditions, "Ready", "False", "Waiting", "for another node", None));
        assert_eq!(conditions[0].last_transition_time.0, jiff::Timestamp::UNIX_EPOCH);
        assert!(set(&mut conditions, "Ready", "True", "Found", "", None));
        assert_ne!(conditions[0].last_transition_time.0, jiff::Timestamp::UNIX_EPOCH);
    }
}

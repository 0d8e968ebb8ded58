//! The handoff: how a volume moves from the node that owns it to another, so that never two can write it and nothing that was
//! written is lost. docs/handoff.md tells it whole.
//!
//! What all parties share is the volume's status in the API, and [`transition`] is the only way in which it changes: an [`Event`] that
//! can't happen to the volume as it is now is refused, and what is allowed is written by compare-and-set. What one party alone knows is
//! what is on its disk, and [`plan`] says what it does next: a pure function of both. [`step`] is the two together, which is all that
//! the controller, the agents, the property tests and the model checker run.

mod copy;
#[cfg(test)]
mod diagram;
mod event;
#[cfg(test)]
mod model;
mod part;
mod plan;
mod reading;
mod snapshots;
mod source;
#[cfg(test)]
mod tests;
mod transition;
#[cfg(test)]
mod transition_tests;

use portolan_crds::PortableVolume;

pub use copy::{Local, concerns, is_copy, known_guids, shared_guids};
pub use event::{Ask, Event, Refused, Round};
pub use part::wants_part;
pub use plan::Action;
pub use reading::{check_whole, copying, is_complete, plan};
pub use snapshots::{Asked, Known, is_final_name, retired_name, travels};
pub use transition::{DIVERGED, applied, ready, transition};

/// What one party knows of a volume.
#[derive(Clone, Debug)]
pub struct State {
    /// The object as it was read, or as its own last write left it.
    pub volume: PortableVolume,
    /// The copy on its disk; none: the pool is there and has no such dataset.
    pub local: Option<Local>,
    /// The snapshots that are wanted of the volume.
    pub asked: Vec<Asked>,
}

/// What is known after an event, and what node `me` does then.
///
/// # Errors
/// When the event can't happen to the volume as it is; nothing has changed then.
pub fn step(me: &str, mut state: State, event: Option<Event>) -> Result<(State, Vec<Action>), Refused> {
    if let Some(event) = event {
        state.volume.status = Some(transition(&state.volume, event)?);
    }
    let actions = plan(me, &state.volume, state.local.as_ref(), &state.asked);
    Ok((state, actions))
}

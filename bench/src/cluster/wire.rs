//! A wire between the nodes that is slower than their processors.

use anyhow::Result;
use portolan_e2e::lab::Lab;

/// What most servers have.
pub const MEGABITS: u32 = 1000;

/// Both ends of the wire, limited until it is dropped.
pub struct Wire<'a> {
    lab: &'a Lab,
    nodes: [String; 2],
}

impl<'a> Wire<'a> {
    /// Limits what each of the nodes sends, to whomever (tc-tbf(8)).
    ///
    /// # Errors
    /// When one of them can't.
    pub fn limit(lab: &'a Lab, nodes: [String; 2]) -> Result<Self> {
        let wire = Self { lab, nodes };
        for node in &wire.nodes {
            let limit = format!("tc qdisc replace dev eth0 root tbf rate {MEGABITS}mbit burst 256kb latency 20ms");
            lab.on_node(node, &limit)?;
        }
        Ok(wire)
    }
}

impl Drop for Wire<'_> {
    fn drop(&mut self) {
        for node in &self.nodes {
            if let Err(error) = self.lab.on_node(node, "tc qdisc del dev eth0 root") {
                eprintln!("the wire of {node} stays limited: {error:#}");
            }
        }
    }
}

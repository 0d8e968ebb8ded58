//! Which parts are asked for: `PARTS="install snapshots"`.

use anyhow::{Result, ensure};

/// The parts' names; none if nobody asks for any.
pub struct Parts(Vec<String>);

impl Parts {
    /// What the environment asks for.
    ///
    /// # Errors
    /// When it names a part that isn't `known`.
    pub fn read(known: &[&str]) -> Result<Self> {
        let asked = std::env::var("PARTS").unwrap_or_default();
        let asked: Vec<String> = asked.split_whitespace().map(str::to_owned).collect();
        ensure!(asked.iter().all(|part| known.contains(&&**part)), "PARTS is {asked:?}: there are {known:?}");
        Ok(Self(asked))
    }

    /// Whether it is this part's turn, which it is by itself only if it is one of the `usual`.
    pub fn has(&self, part: &str, usual: bool) -> bool {
        (usual && self.0.is_empty()) || self.0.iter().any(|asked| asked == part)
    }
}

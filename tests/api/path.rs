//! What a request is about.

use serde_json::Value;

use super::Key;

/// A path of the API, taken apart.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Path {
    /// Group and plural: `portolan.dev/portablevolumes`, `/nodes`.
    pub kind: String,
    /// Empty if there is none.
    pub namespace: String,
    /// Empty if it is about all of a kind.
    pub name: String,
    /// What of the object: `status`, or empty.
    pub part: String,
}

impl Path {
    /// `/api/v1/...` or `/apis/GROUP/VERSION/...`; none if it is something else.
    pub fn parse(path: &str) -> Option<Self> {
        let words: Vec<&str> = path.trim_matches('/').split('/').collect();
        let (group, mut rest) = match words.as_slice() {
            ["api", _, rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => return None,
        };
        let mut namespace = "";
        if let ["namespaces", of, inner @ ..] = rest
            && !inner.is_empty()
        {
            (namespace, rest) = (of, inner);
        }
        let word = |at: usize| rest.get(at).copied().unwrap_or_default().to_owned();
        let plural = rest.first()?;
        Some(Self { kind: format!("{group}/{plural}"), namespace: namespace.to_owned(), name: word(1), part: word(2) })
    }

    /// Whether it is about the status alone.
    pub fn is_status(&self) -> bool {
        self.part == "status"
    }

    /// Whether an object is among those that it is about.
    pub(super) fn lists(&self, (kind, namespace, _): &Key) -> bool {
        *kind == self.kind && (self.namespace.is_empty() || *namespace == self.namespace)
    }

    pub(super) fn key(&self) -> Key {
        (self.kind.clone(), self.namespace.clone(), self.name.clone())
    }
}

/// The fields that a list is limited to: JSON pointer and value.
pub(super) fn field_selectors(query: &str) -> Vec<(String, String)> {
    let given = query.split('&').find_map(|pair| pair.strip_prefix("fieldSelector=")).unwrap_or_default();
    let given = given.replace("%3D", "=").replace("%2C", ",");
    let pairs = given.split(',').filter_map(|pair| pair.split_once('='));
    pairs.map(|(field, value)| (format!("/{}", field.replace('.', "/")), value.to_owned())).collect()
}

/// Whether an object is one of those that a list is limited to.
pub(super) fn fit(selectors: &[(String, String)], object: &Value) -> bool {
    selectors.iter().all(|(pointer, wanted)| object.pointer(pointer).and_then(Value::as_str) == Some(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart() {
        let parts =
            |path: &str| Path::parse(path).map(|path| [path.kind, path.namespace, path.name, path.part].join(" "));
        let volume = "/apis/portolan.dev/v1alpha1/portablevolumes/pvc-1/status";
        assert_eq!(parts(volume).as_deref(), Some("portolan.dev/portablevolumes  pvc-1 status"));
        assert_eq!(parts("/api/v1/nodes?").as_deref(), Some("/nodes?   "));
        assert_eq!(parts("/api/v1/namespaces/n/configmaps/c").as_deref(), Some("/configmaps n c "));
        assert_eq!(parts("/api/v1/namespaces/n").as_deref(), Some("/namespaces  n "));
        assert_eq!(parts("/healthz"), None);
        let wanted = [("/spec/volume".to_owned(), "pvc-1".to_owned())];
        assert_eq!(field_selectors("&fieldSelector=spec.volume%3Dpvc-1&limit=5"), wanted);
    }
}

//! The container runtime's configuration: the node's own first one, with Portolan's plugin at its end, or Portolan's plugin alone.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value, json};

/// The file that the agent writes. Runtimes take the first file of the directory.
pub const FILE: &str = "00-portolan.conflist";
/// The plugin's name in the CNI bin directory, and its `type`.
pub const PLUGIN: &str = "portolan";
/// The name of the network that pods are on where there is no other plugin.
const NETWORK: &str = "portolan";
/// The version for a configuration that names none: the oldest that chains as we need it.
const FALLBACK_VERSION: &str = "0.4.0";

/// The configuration can't be derived or written.
#[derive(Debug, thiserror::Error)]
pub enum ConflistError {
    /// A file can't be read or written.
    #[error("{path}: {action}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The node's own configuration isn't one.
    #[error("{path}: not a CNI configuration: {reason}")]
    Primary {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

fn file_error(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> ConflistError {
    move |source| ConflistError::File { path: path.to_owned(), action, source }
}

/// Writes the conflist anew if the node's own configuration asks for another than is there; removes it if there is none.
/// Returns whether anything changed.
///
/// # Errors
/// When a file can't be read or written; what was there then stays.
pub fn update(directory: &Path, socket: &str) -> Result<bool, ConflistError> {
    let wanted = match primary(directory)? {
        Some(path) => {
            let text = fs::read_to_string(&path).map_err(file_error(&path, "read"))?;
            let is_list = path.extension().is_some_and(|e| e == "conflist");
            Some(derive(&text, is_list, socket).map_err(|reason| ConflistError::Primary { path, reason })?)
        }
        None => None,
    };
    replace(directory, wanted.as_deref())
}

/// Writes the conflist of a node without another plugin, unless it is there. Returns whether anything changed.
///
/// # Errors
/// When a file can't be read or written; what was there then stays.
pub fn write_alone(directory: &Path, socket: &str) -> Result<bool, ConflistError> {
    // 1.0.0, as runtimes that don't know 1.1.0 refuse what says so.
    let plugin = json!({
        "type": PLUGIN, "primary": true, "agentSocket": socket, "capabilities": { "portMappings": true },
    });
    let list = json!({ "cniVersion": "1.0.0", "name": NETWORK, "plugins": [plugin] });
    fs::create_dir_all(directory).map_err(file_error(directory, "make directory"))?;
    replace(directory, Some(&format!("{list:#}\n")))
}

/// Makes the conflist what is wanted: none, or that.
fn replace(directory: &Path, wanted: Option<&str>) -> Result<bool, ConflistError> {
    let target = directory.join(FILE);
    let present = match fs::read_to_string(&target) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        other => Some(other.map_err(file_error(&target, "read"))?),
    };
    if wanted == present.as_deref() {
        return Ok(false);
    }
    match wanted {
        Some(text) => replace_file(&target, text.as_bytes(), 0o600)?,
        None => remove_file(&target)?,
    }
    Ok(true)
}

/// The first configuration of a directory that isn't ours, in the runtimes' order.
fn primary(directory: &Path) -> Result<Option<PathBuf>, ConflistError> {
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(file_error(directory, "list"))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(file_error(directory, "list"))?.path();
        let is_configuration = path.extension().is_some_and(|e| e == "conf" || e == "conflist" || e == "json");
        if is_configuration && path.file_name().is_some_and(|n| n != FILE) {
            found.push(path);
        }
    }
    Ok(found.into_iter().min())
}

/// The node's configuration with our plugin at its end. The network keeps its name: the runtime finds what pods of before had.
fn derive(text: &str, is_list: bool, socket: &str) -> Result<String, String> {
    let mut list: Map<String, Value> = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if !is_list {
        let mut plugin = list;
        list = Map::new();
        for key in ["cniVersion", "name"] {
            list.extend(plugin.remove(key).map(|value| (key.to_owned(), value)));
        }
        list.insert("plugins".into(), json!([plugin]));
    }
    list.entry("cniVersion").or_insert_with(|| FALLBACK_VERSION.into());
    if !list.get("name").is_some_and(Value::is_string) {
        return Err("name is missing".into());
    }
    let plugins = list.get_mut("plugins").and_then(Value::as_array_mut).ok_or("plugins is not a list")?;
    plugins.retain(|p| p["type"] != PLUGIN);
    if plugins.is_empty() || !plugins.iter().all(|p| p["type"].is_string()) {
        return Err("plugins needs at least one entry, each with a type".into());
    }
    plugins.push(json!({ "type": PLUGIN, "agentSocket": socket }));
    serde_json::to_string_pretty(&list).map(|text| text + "\n").map_err(|e| e.to_string())
}

/// Puts the plugin into the CNI bin directory, unless the same is there.
///
/// # Errors
/// When it can't be read or written.
pub fn install_plugin(source: &Path, directory: &Path) -> Result<(), ConflistError> {
    let bytes = fs::read(source).map_err(file_error(source, "read"))?;
    let target = directory.join(PLUGIN);
    if fs::read(&target).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    fs::create_dir_all(directory).map_err(file_error(directory, "make directory"))?;
    replace_file(&target, &bytes, 0o755)
}

/// Takes the conflist away first and then the plugin, so that the runtime never sees a plugin that isn't there.
///
/// # Errors
/// When a file can't be removed.
pub fn uninstall(configurations: &Path, binaries: &Path) -> Result<(), ConflistError> {
    remove_file(&configurations.join(FILE))?;
    remove_file(&binaries.join(PLUGIN))
}

/// Replaces a file in one step: a runtime sees the old one or the new one.
fn replace_file(target: &Path, bytes: &[u8], mode: u32) -> Result<(), ConflistError> {
    use std::os::unix::fs::PermissionsExt;
    // No extension that a runtime reads.
    let temporary = target.with_extension("portolan-new");
    let write = || {
        fs::write(&temporary, bytes)?;
        fs::set_permissions(&temporary, fs::Permissions::from_mode(mode))?;
        fs::File::open(&temporary)?.sync_all()?;
        fs::rename(&temporary, target)
    };
    write().map_err(file_error(target, "write"))
}

fn remove_file(path: &Path) -> Result<(), ConflistError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(file_error(path, "remove")(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: &str = "/run/portolan/cni.sock";

    fn read(directory: &Path) -> Value {
        serde_json::from_str(&fs::read_to_string(directory.join(FILE)).unwrap()).unwrap()
    }

    #[test]
    fn follows_the_nodes_own_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        assert!(!update(path, SOCKET).unwrap(), "nothing to chain after yet");
        fs::write(
            path.join("10-bridge.conflist"),
            r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge"}]}"#,
        )
        .unwrap();
        fs::write(path.join("20-other.conf"), r#"{"cniVersion":"1.0.0","name":"other","type":"ptp"}"#).unwrap();
        assert!(update(path, SOCKET).unwrap());
        assert!(!update(path, SOCKET).unwrap(), "a second time changes nothing");
        let ours = json!({"type": "portolan", "agentSocket": SOCKET});
        assert_eq!(read(path), json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, ours]}));
        fs::remove_file(path.join("10-bridge.conflist")).unwrap();
        assert!(update(path, SOCKET).unwrap());
        assert_eq!(read(path), json!({"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "ptp"}, ours]}));
        fs::remove_file(path.join("20-other.conf")).unwrap();
        assert!(update(path, SOCKET).unwrap());
        assert!(!path.join(FILE).exists());
    }

    #[test]
    fn a_broken_configuration_leaves_what_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let primary = path.join("10-a.conflist");
        fs::write(&primary, r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge"}]}"#).unwrap();
        update(path, SOCKET).unwrap();
        let before = read(path);
        for broken in ["{", r#"{"name":"x"}"#, r#"{"name":"x","plugins":[]}"#, r#"{"plugins":[{"type":"bridge"}]}"#] {
            fs::write(&primary, broken).unwrap();
            let error = update(path, SOCKET).unwrap_err().to_string();
            assert!(error.contains("10-a.conflist"), "{error}");
            assert_eq!(read(path), before);
        }
    }

    #[test]
    fn the_plugin_comes_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let source = directory.path().join("portolan-cni");
        fs::write(&source, "program").unwrap();
        let binaries = directory.path().join("bin");
        install_plugin(&source, &binaries).unwrap();
        install_plugin(&source, &binaries).unwrap();
        assert_eq!(fs::read_to_string(binaries.join(PLUGIN)).unwrap(), "program");
        uninstall(directory.path(), &binaries).unwrap();
        uninstall(directory.path(), &binaries).unwrap();
        assert!(!binaries.join(PLUGIN).exists());
    }
}

//! The running lab: commands in its control plane and on its nodes.

use std::{
    fmt::Display,
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// A lab that is up, and the clock of what is shown in it.
#[derive(Clone)]
pub struct Lab {
    script: PathBuf,
    started: Instant,
    openzfs: bool,
}

impl Lab {
    /// The lab of the lane that the environment variable `LANE` names (`native` if it names none).
    ///
    /// # Errors
    /// When no such lab is up.
    pub fn connect() -> Result<Self> {
        let script = repository().join("e2e/lab/lab");
        let openzfs = std::env::var("LANE").is_ok_and(|lane| lane == "openzfs");
        let lab = Self { script, started: Instant::now(), openzfs };
        lab.kubectl(&["get", "--raw", "/readyz"]).context("is the lab up? (make lab-up)")?;
        Ok(lab)
    }

    /// Whether the nodes' pools can have zvols, so volumes can be block devices.
    pub fn has_zvols(&self) -> bool {
        self.openzfs
    }

    /// Whether the nodes' kernel has WireGuard.
    pub fn has_wireguard(&self) -> bool {
        self.openzfs
    }

    /// Whether there is a node beside those with pools, on which Portolan's controllers belong.
    pub fn has_control_node(&self) -> bool {
        self.openzfs
    }

    /// Prints what happens next, with the seconds since the start.
    pub fn step(&self, what: impl Display) {
        println!("\n== [{:6.1} s] {what}", self.started.elapsed().as_secs_f64());
    }

    /// Prints one line or block, indented, under the current step.
    pub fn show(&self, text: impl Display) {
        for line in text.to_string().trim_end().lines() {
            println!("   {line}");
        }
    }

    /// The names of the lab's nodes that have a pool.
    ///
    /// # Errors
    /// When the lab does not answer.
    pub fn nodes(&self) -> Result<Vec<String>> {
        Ok(self.lab(&["nodes"], None)?.lines().map(str::to_string).collect())
    }

    /// Does to a node what the lab's verb says: `crash` and `start`, `cut` and `mend`.
    ///
    /// # Errors
    /// When the lab can't.
    pub fn verb(&self, verb: &str, node: &str) -> Result<()> {
        self.lab(&[verb, node], None).map(drop)
    }

    /// Runs a shell command as root on a node and returns what it prints.
    ///
    /// # Errors
    /// When it exits other than with 0.
    pub fn on_node(&self, node: &str, command: &str) -> Result<String> {
        self.lab(&["node", node, "sh", "-c", command], None)
    }

    /// The file of this machine that is the disk of a node's pool.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn disk(&self, node: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(self.lab(&["disk", node], None)?.trim_end()))
    }

    /// Puts a copy of a file of this machine on a node.
    ///
    /// # Errors
    /// When it can't be read, or written there.
    pub fn copy_to_node(&self, node: &str, file: &Path, path: &str) -> Result<()> {
        let from = File::open(file).with_context(|| format!("{}", file.display()))?;
        let mut command = self.command(&["node", node, "sh", "-c", &format!("cat > '{path}'")]);
        let out = command.stdin(from).output()?;
        ensure!(out.status.success(), "{path} on {node}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }

    /// The folder with the programs of a group of `lab/build/binaries`, built if they are not there.
    ///
    /// # Errors
    /// When they can't be.
    pub fn binaries(&self, group: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(self.build("binaries", Some(group))?.trim()))
    }

    /// Imports the images of a group of `lab/build/images` onto all nodes.
    ///
    /// # Errors
    /// When they can't be built, or a node doesn't take them.
    pub fn import(&self, group: &str) -> Result<()> {
        let archives = self.build("images", Some(group))?;
        self.lab(&[&["import"], archives.lines().collect::<Vec<_>>().as_slice()].concat(), None)?;
        Ok(())
    }

    /// The archive of a program that `lab/build/NAME` makes for the nodes, built if it is not there.
    ///
    /// # Errors
    /// When it can't be.
    pub fn tool(&self, name: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(self.build(name, None)?.trim()))
    }

    fn build(&self, what: &str, group: Option<&str>) -> Result<String> {
        let script = repository().join("e2e/lab/build").join(what);
        // What it builds it says on standard error, which is ours.
        let out = Command::new(&script).args(group).stderr(Stdio::inherit()).output()?;
        ensure!(out.status.success(), "{} {}: {}", script.display(), group.unwrap_or_default(), out.status);
        Ok(String::from_utf8(out.stdout)?)
    }

    /// Runs a program in the control plane's network with all its output in a file; returns whether it exited with 0.
    ///
    /// # Errors
    /// When the file can't be written or the lab doesn't start it.
    pub fn run_logged(&self, program: &[&str], log: &Path) -> Result<bool> {
        let output = File::create(log).with_context(|| format!("{}", log.display()))?;
        let mut command = self.command(&[&["run"], program].concat());
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(command.status()?.success())
    }

    /// `kubectl ARGS`, returning standard output.
    ///
    /// # Errors
    /// When it exits other than with 0; the message has its standard error.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.lab(&[&["run", "kubectl"], args].concat(), None)
    }

    /// `kubectl ARGS -o json`, parsed.
    ///
    /// # Errors
    /// As [`Lab::kubectl`].
    pub fn json(&self, args: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[args, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).context("kubectl prints JSON")
    }

    /// `kubectl apply` of a text.
    ///
    /// # Errors
    /// As [`Lab::kubectl`].
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.lab(&["run", "kubectl", "apply", "-f", "-"], Some(yaml))
    }

    /// `helm ARGS`, in the repository's root.
    ///
    /// # Errors
    /// As [`Lab::kubectl`].
    pub fn helm(&self, args: &[&str]) -> Result<String> {
        self.lab(&[&["run", "helm"], args].concat(), None)
    }

    /// Asks until the answer is there; `seconds` is for the native lane.
    ///
    /// # Errors
    /// When it isn't in time; the message has what was waited for and the newest reason.
    pub fn wait<T>(&self, what: &str, seconds: u32, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
        // Guests are emulated: what a native node does in one second takes them four, and ten while something else wants the processors.
        // Each question costs them, too.
        let (seconds, pause) = if self.openzfs { (seconds * 10, 2000) } else { (seconds, 200) };
        let deadline = Instant::now() + Duration::from_secs(u64::from(seconds));
        loop {
            match ask() {
                Ok(answer) => return Ok(answer),
                Err(reason) if Instant::now() >= deadline => {
                    return Err(reason).with_context(|| format!("waited {seconds} s for: {what}"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(pause)),
            }
        }
    }

    /// Starts a command of the lab (`node NODE ...`, `run ...`) with pipes for standard input and output; its errors go where ours do.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(&self, args: &[&str]) -> Result<Child> {
        let mut command = self.command(args);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        child.with_context(|| format!("{} {}", self.script.display(), args.join(" ")))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.script);
        command.args(args).current_dir(repository());
        command
    }

    /// Runs a shell command as root on a node, with `$0` and something to read, and returns what it prints.
    ///
    /// # Errors
    /// When it exits other than with 0.
    pub fn pipe_on_node(&self, node: &str, command: &str, argument: &str, stdin: &[u8]) -> Result<Vec<u8>> {
        self.bytes(&["node", node, "sh", "-c", command, argument], Some(stdin))
    }

    /// The words that run a command on a node, with all that they need from the environment.
    pub fn words_on_node(&self, node: &str) -> Vec<String> {
        let wanted = ["LANE", "LAB_NAME", "PORTOLAN_CACHE", "XDG_CACHE_HOME", "HOME"];
        let set = wanted.iter().filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)));
        let script = self.script.display().to_string();
        ["env".to_owned()].into_iter().chain(set).chain([script, "node".to_owned(), node.to_owned()]).collect()
    }

    fn lab(&self, args: &[&str], stdin: Option<&str>) -> Result<String> {
        let printed = self.bytes(args, stdin.map(str::as_bytes))?;
        Ok(String::from_utf8_lossy(&printed).into_owned())
    }

    fn bytes(&self, args: &[&str], stdin: Option<&[u8]>) -> Result<Vec<u8>> {
        let mut child = self
            .command(args)
            .stdin(if stdin.is_some() { Stdio::piped() } else { Stdio::null() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}", self.script.display()))?;
        if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
            pipe.write_all(text)?;
        }
        let out = child.wait_with_output()?;
        if !out.status.success() {
            let stdout = String::from_utf8_lossy(&out.stdout);
            bail!("{}: {}\n{}{stdout}", args.join(" "), out.status, String::from_utf8_lossy(&out.stderr));
        }
        Ok(out.stdout)
    }
}

/// The repository's root: that of the tree which make or cargo runs us for. The one that we were compiled in may be another, since trees
/// share what is compiled, and may be gone.
pub fn repository() -> PathBuf {
    let package = || std::env::var_os("CARGO_MANIFEST_DIR").map(|package| Path::new(&package).join(".."));
    std::env::var_os("PORTOLAN_REPOSITORY").map(PathBuf::from).or_else(package).unwrap_or_else(|| ".".into())
}

/// A string in a JSON object, by pointer.
///
/// # Errors
/// When there is none.
pub fn text<'a>(object: &'a Value, pointer: &str) -> Result<&'a str> {
    let found = object.pointer(pointer).and_then(Value::as_str);
    found.with_context(|| format!("no text at {pointer} of {}", object.pointer("/metadata/name").unwrap_or(object)))
}

/// Fails unless two things are the same, saying what they are.
///
/// # Errors
/// When they differ.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Result<()> {
    ensure!(found == expected, "{what}: found {found:?}, expected {expected:?}");
    Ok(())
}

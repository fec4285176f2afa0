//! The daemon's life: start-up, refusals, locks, death, drain, what it leaves behind.

mod support;

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;

use fastaa::transport::client::{ClientError, ClientEvent};
use fastaa::transport::wire::ErrorCode;
use support::{Host, next_batch, read_epoch, request, write_idx};

/// The daemon must refuse this configuration with exit code 78 and these words.
fn check_refused(configuration: &str, expected: &[&str]) {
    let host = Host::new("");
    fs::write(host.config(), configuration).expect("writes");
    let (code, stderr) = host.start_refused();
    assert_eq!(code, 78, "{stderr}");
    for part in expected {
        assert!(stderr.contains(part), "{stderr:?} does not contain {part:?}");
    }
    assert!(stderr.contains("hint: "), "{stderr:?} has no hint");
}

#[test]
fn a_bad_configuration_exits_78_and_names_place_and_cure() {
    let dataset = "state_dir = \"s\"\nruntime_dir = \"r\"\n[[dataset]]\nname = \"d\"\n";
    let train = "train = \"train-images-idx3-ubyte\"\n";
    check_refused(
        &format!("{dataset}trian = \"x\"\n"),
        &["c.toml", "line 5", "unknown field `trian`", "did you mean `train`?"],
    );
    check_refused(
        &format!("{dataset}{train}[workers]\nthreads = \"two\"\n"),
        &["line 7", "threads"],
    );
    check_refused(&format!("{dataset}train = \"nothing-there\"\n"), &["'d'", "nothing-there"]);
    check_refused(
        &format!("{dataset}{train}[stream.defaults]\npolicy = \"nonne\"\n"),
        &["stream.defaults.policy", "did you mean 'none'?"],
    );
    check_refused(
        &format!("{dataset}{train}[telemetry]\nlog = \"loud\"\n"),
        &["telemetry.log", "'loud' names no level"],
    );
    check_refused(&format!("{dataset}{train}").replace("\"r\"", "\"\""), &["runtime_dir", "empty"]);
    check_refused(
        &format!("{dataset}{train}[telemetry]\nlog = \"fastaa=loud\"\n"),
        &["telemetry.log", "write for example \"info\""],
    );
    let long = "x".repeat(100);
    check_refused(
        &format!(
            "runtime_dir = \"/tmp/{long}\"\nstate_dir = \"s\"\n[[dataset]]\nname = \"d\"\n{train}"
        ),
        &["runtime_dir", "choose a shorter folder"],
    );
}

#[test]
fn damaged_datasets_exit_78_and_name_the_file() {
    let check = |damage: &dyn Fn(&Host), expected: &[&str]| {
        let host = Host::new("");
        damage(&host);
        let (code, stderr) = host.start_refused();
        assert_eq!(code, 78, "{stderr}");
        for part in expected {
            assert!(stderr.contains(part), "{stderr:?} does not contain {part:?}");
        }
    };
    let images = "train-images-idx3-ubyte";
    check(
        &|host| {
            let bytes = fs::read(host.path(images)).expect("reads");
            fs::write(host.path(images), &bytes[..bytes.len() - 1]).expect("writes");
        },
        &["dataset 'digits'", images],
    );
    check(
        &|host| {
            let mut bytes = fs::read(host.path(images)).expect("reads");
            bytes[2] = 9;
            fs::write(host.path(images), bytes).expect("writes");
        },
        &["dataset 'digits'", images],
    );
    check(&|host| write_idx(host.dir.path(), "train", 0), &["dataset 'digits'", images]);
    check(
        &|host| fs::remove_file(host.path("train-labels-idx1-ubyte")).expect("removes"),
        &["dataset 'digits'", "labels"],
    );
}

#[test]
fn check_prints_the_effective_configuration_and_opens_nothing() {
    let host = Host::new("");
    let output = host.command().arg("--check").output().expect("runs");
    assert!(output.status.success());
    let printed = String::from_utf8(output.stdout).expect("is text");
    assert!(printed.contains("name = \"digits\"") && printed.contains("threads = "), "{printed}");
    assert!(!host.path("run").exists() && !host.path("state").exists());
    fs::write(host.path("printed.toml"), &printed).expect("writes");
    let output = Command::new(env!("CARGO_BIN_EXE_fastaa-loaderd"))
        .arg("--check")
        .arg("--config")
        .arg(host.path("printed.toml"))
        .output()
        .expect("runs");
    assert_eq!(String::from_utf8(output.stdout).expect("is text"), printed);
}

#[test]
fn a_runtime_folder_below_a_file_is_refused() {
    let host = Host::new("");
    fs::write(host.path("file"), "").expect("writes");
    let text = fs::read_to_string(host.config()).expect("reads");
    fs::write(host.config(), text.replace("\"run\"", "\"file/run\"")).expect("writes");
    let (code, stderr) = host.start_refused();
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("runtime_dir") && stderr.contains("file/run"), "{stderr}");
    assert!(stderr.contains("hint: choose a folder that can be made"), "{stderr}");
}

#[test]
fn a_state_folder_below_a_file_is_refused() {
    let host = Host::new("");
    fs::write(host.path("file"), "").expect("writes");
    let text = fs::read_to_string(host.config()).expect("reads");
    fs::write(host.config(), text.replace("\"state\"", "\"file/state\"")).expect("writes");
    let (code, stderr) = host.start_refused();
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("file/state"), "{stderr}");
}

#[test]
fn a_living_daemon_keeps_its_folder() {
    let host = Host::new("");
    let daemon = host.start();
    let mut client = host.connect(request(10, "{}")).expect("connects");
    let (code, stderr) = host.start_refused();
    assert_eq!(code, 1, "{stderr}");
    let pid = daemon.child.id();
    assert!(stderr.contains(&format!("another fastaa-loaderd (pid {pid}) serves")), "{stderr}");
    assert!(stderr.contains("hint: stop it, or choose another runtime_dir"), "{stderr}");
    // The refused one has not touched the sockets: old and new clients are served.
    read_epoch(&mut client, 0);
    read_epoch(&mut host.connect(request(10, "{}")).expect("connects"), 0);
    drop(client);
    assert_eq!(daemon.stop(), 0);
}

fn names_in(host: &Host, folder: &str) -> Vec<String> {
    let entries = fs::read_dir(host.path(folder)).expect("reads the folder");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort_unstable();
    names
}

#[test]
fn a_killed_daemon_leaves_only_dead_sockets_and_its_lock_which_the_next_replaces() {
    let host = Host::new("");
    let daemon = host.start();
    let mut client = host.connect(request(10, "{}")).expect("connects");
    client.start(0, 0, "").expect("starts");
    assert!(matches!(client.next_event(), Ok(ClientEvent::Begin(_))));
    daemon.kill();
    assert_eq!(names_in(&host, "run"), ["control.sock", "data.sock", "hello.sock", "lock"]);
    let gone = std::iter::repeat_with(|| client.next_event()).find_map(Result::err);
    assert!(matches!(gone, Some(ClientError::Gone(_))), "{gone:?}");

    let daemon = host.start();
    let mut client = host.connect(request(10, "{}")).expect("connects");
    read_epoch(&mut client, 0);
    drop(client);
    assert_eq!(daemon.stop(), 0);
    assert_eq!(names_in(&host, "run"), ["lock"]);
}

#[test]
fn sigterm_drains_and_says_goodbye() {
    let host = Host::new("");
    let daemon = host.start();
    let slots = fastaa::transport::wire::StreamRequest { n_slots: 4, ..request(10, "{}") };
    let mut client = host.connect(slots).expect("connects");
    client.start(0, 0, "").expect("starts");
    assert!(matches!(client.next_event(), Ok(ClientEvent::Begin(_))));
    let first = next_batch(&mut client).expect("a batch");
    daemon.signal(rustix::process::Signal::TERM);
    // Everything that was being filled still comes, then the good-bye.
    let mut held = vec![first];
    let reason = loop {
        match client.next_event() {
            Ok(ClientEvent::Batch(batch)) => held.push(batch),
            Ok(_) => panic!("no epoch ends or begins"),
            Err(ClientError::Gone(reason)) => break reason,
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(reason, "the daemon is stopping");
    assert!(held.len() <= 4);
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn a_foreign_user_is_refused_unless_allowed() {
    const NOBODY: u32 = 65_534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: only root can become another user");
        return;
    }
    let host = Host::new("");
    let connect_as_nobody = |host: &Host| {
        // The folders are opened for everybody, so that only the daemon's own check is left.
        for folder in [host.dir.path().to_owned(), host.path("run")] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(folder, mode).expect("opens the folder");
        }
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(host.hello_socket(), mode).expect("opens the socket");
        let script = "import socket, sys\n\
            s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n\
            s.connect(sys.argv[1])\n\
            s.shutdown(socket.SHUT_WR)\n\
            print(s.recv(65536).decode('latin1') or 'hung up')\n";
        let output = Command::new("/usr/bin/python3")
            .args(["-c", script])
            .arg(host.hello_socket())
            .uid(NOBODY)
            .output()
            .expect("python3 runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr)
    };
    let daemon = host.start();
    let answer = connect_as_nobody(&host);
    assert!(answer.contains(&format!("user {NOBODY} may not subscribe")), "{answer}");
    assert!(answer.contains("allowed_uids"), "{answer}");
    assert_eq!(daemon.stop(), 0);

    let text = fs::read_to_string(host.config()).expect("reads");
    fs::write(host.config(), format!("allowed_uids = [{NOBODY}]\n{text}")).expect("writes");
    let daemon = host.start();
    let answer = connect_as_nobody(&host);
    assert!(answer.contains("hung up") || answer.contains("empty hello"), "{answer}");
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn every_refusal_of_a_request_names_the_value() {
    use ErrorCode::{Invalid, Malformed, NotFound};

    let host = Host::new("");
    let _daemon = host.start();
    let check = |change: &dyn Fn(&mut fastaa::transport::wire::StreamRequest),
                 code: ErrorCode,
                 expected: &str| {
        let mut wrong = request(10, "{}");
        change(&mut wrong);
        let error = host.connect(wrong).err().expect("must be refused");
        let ClientError::Refused(refusal) = error else { panic!("{error}") };
        assert_eq!(refusal.code, code, "{refusal:?}");
        assert!(refusal.message.contains(expected), "{refusal:?}");
    };
    check(&|r| r.batch_size = 0, Invalid, "batch_size 0");
    check(
        &|r| (r.batch_size, r.drop_last) = (1001, true),
        Invalid,
        "drop_last leaves no batch at all",
    );
    check(&|r| (r.rank, r.world_size) = (2, 2), Invalid, "rank 2 is not below world_size 2");
    check(&|r| r.world_size = 0, Invalid, "world_size 0");
    check(&|r| r.n_slots = 1, Invalid, "n_slots 1");
    check(&|r| r.dataset = "digit".into(), NotFound, "did you mean 'digits'?");
    check(&|r| r.split = "valid".into(), NotFound, "has no split 'valid'");
    check(&|r| r.recipe_json = "[".into(), Malformed, "no JSON object");
    check(&|r| r.recipe_json = r#"{"polcy": 1}"#.into(), Invalid, "did you mean `policy`?");
    check(&|r| r.recipe_json = r#"{"policy": "digits@7"}"#.into(), NotFound, "7");
    check(
        &|r| r.recipe_json = r#"{"crop": {"kind": "pad", "size": 40, "pad": 2}}"#.into(),
        Invalid,
        "40 is larger than the images (12x12)",
    );
    check(
        &|r| r.recipe_json = r#"{"normalize": {"mean": [0,0,0], "std": [1,1,1]}}"#.into(),
        Invalid,
        "3 numbers for 1 channel(s)",
    );
    check(
        &|r| r.recipe_json = r#"{"channels": 2}"#.into(),
        Invalid,
        "'channels': must be 1 (gray) or 3 (RGB)",
    );
    check(&|r| r.dataset = "d".repeat(200), Invalid, "name is 200 bytes long");
}

#[test]
fn systemd_hears_ready_watchdog_and_stopping() {
    let host = Host::new("");
    let path = host.path("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).expect("binds");
    socket.set_read_timeout(Some(support::WAIT_MAX)).expect("sets");
    let heard_until = |word: &str| {
        let mut buffer = [0; 1024];
        loop {
            let n_bytes = socket.recv(&mut buffer).expect("the daemon speaks");
            let text = String::from_utf8_lossy(&buffer[..n_bytes]);
            if text.lines().any(|line| line == word) {
                return;
            }
        }
    };
    let mut child = host.command().env("NOTIFY_SOCKET", &path).spawn().expect("starts");
    heard_until("READY=1");
    // Ready means ready: the very first attempt is served.
    read_epoch(&mut host.connect(request(10, "{}")).expect("connects"), 0);
    heard_until("WATCHDOG=1");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("is signalled");
    heard_until("STOPPING=1");
    assert!(child.wait().expect("ends").success());
}

#[test]
fn a_closed_terminal_drains_and_user_signals_do_nothing() {
    use rustix::process::Signal;
    let host = Host::new("");
    let mut daemon = host.start();
    daemon.signal(Signal::USR1);
    daemon.signal(Signal::USR2);
    read_epoch(&mut host.connect(request(10, "{}")).expect("connects"), 0);
    daemon.signal(Signal::HUP);
    assert!(daemon.child.wait().expect("ends").success());
}

#[test]
fn a_runtime_folder_that_others_could_take_over_is_refused() {
    let host = Host::new("");
    let run = host.path("run");
    fs::create_dir(&run).expect("creates");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(&run, mode).expect("opens the folder");
    let (code, stderr) = host.start_refused();
    assert_eq!(code, 1);
    assert!(stderr.contains("can be written to by everybody"), "{stderr}");
    assert!(stderr.contains("hint: chmod o-w it"), "{stderr}");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o750);
    fs::set_permissions(&run, mode).expect("closes the folder");
    fs::write(run.join("hello.sock"), "precious").expect("writes");
    let (code, stderr) = host.start_refused();
    assert_eq!(code, 1);
    assert!(stderr.contains("hello.sock is in the way and no socket"), "{stderr}");
    assert_eq!(fs::read(run.join("hello.sock")).expect("reads"), b"precious");
    if rustix::process::geteuid().is_root() {
        fs::remove_file(run.join("hello.sock")).expect("removes");
        std::os::unix::fs::chown(&run, Some(65_534), None).expect("gives it away");
        let (code, stderr) = host.start_refused();
        assert_eq!(code, 1);
        assert!(stderr.contains("belongs to user 65534, not to user 0"), "{stderr}");
    }
}

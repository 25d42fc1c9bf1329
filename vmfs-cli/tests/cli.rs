//! The built binary: exit codes, what goes to which stream, and that failures leave no trace.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

fn vmfs(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmfs"));
    command.args(args).env_remove("VMFS_SOCKET").env("NO_COLOR", "1").output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("not ended by a signal")
}

/// The one line on standard error, which a failure promises.
fn line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "one line: {text:?}");
    assert!(text.starts_with("vmfs: "), "{text:?}");
    text.trim_end().to_owned()
}

#[test]
fn wrong_usage_is_one_line_and_exit_code_2() {
    for args in [
        &[][..],
        &["frobnicate"],
        &["promote"],
        &["up"],
        &["up", "x", "--hosts", "6"],
        &["up", "x", "--hosts", "0"],
        &["wait", "a", "--timeout", "never"],
        &["policy", "set", "a"],
        &["policy", "set", "a", "--acks", "most"],
        &["handover", "a"],
        &["replica", "add", "a"],
        &["host", "invite", "../b"],
        &["promote", "a", "--member", "b"],
        &["info", ""],
        &["info", "/"],
        &["info", "a/../b"],
        &["info", "../b"],
        &["status", "--no-such-flag"],
    ] {
        let output = vmfs(args);
        assert_eq!(code(&output), 2, "{args:?}: {output:?}");
        assert!(output.stdout.is_empty());
        line(&output);
    }
    let long = "n".repeat(256);
    let output = vmfs(&["info", &long]);
    assert_eq!(code(&output), 2);
    assert!(line(&output).contains("longer than 255 bytes"));
    assert!(!Path::new("x").exists(), "nothing was made");
}

#[test]
fn help_and_version_succeed() {
    for args in [&["--help"][..], &["--version"], &["up", "--help"], &["policy", "set", "--help"]] {
        let output = vmfs(args);
        assert_eq!(code(&output), 0);
        assert!(!output.stdout.is_empty() && output.stderr.is_empty(), "{args:?}");
    }
    let help = String::from_utf8(vmfs(&["--help"]).stdout).unwrap();
    for command in [
        "up",
        "down",
        "status",
        "ls",
        "info",
        "promote",
        "handover",
        "verify",
        "replica",
        "forks",
        "fork",
        "datastore",
        "host",
        "wait",
        "fail",
        "policy",
    ] {
        assert!(help.lines().any(|l| l.trim_start().starts_with(command)), "{command} is not in the help");
    }
}

#[test]
fn without_a_daemon_every_command_fails_and_names_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vmfs.sock");
    let stale = dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    for socket in [&socket, &stale] {
        let socket = socket.to_str().unwrap();
        for command in [
            &["status"][..],
            &["status", "--json"],
            &["status", "--watch"],
            &["ls"],
            &["info", "a"],
            &["info", "/a"],
            &["promote", "a", "--force"],
            &["handover", "a", "--to", "b"],
            &["verify", "a", "--deep"],
            &["replica", "add", "a", "b"],
            &["replica", "remove", "a", "b"],
            &["forks"],
            &["fork", "drop", "x"],
            &["fork", "export", "x", "out.img"],
            &["wait", "a", "--timeout", "0"],
            &["fail", "a"],
            &["policy", "show", "a"],
            &["policy", "set", "a", "--acks", "all"],
            &["host", "list"],
            &["host", "remove", "b"],
            &["host", "invite", "b"],
        ] {
            let output = vmfs(&[&["--socket", socket], command].concat());
            assert_eq!(code(&output), 1, "{command:?}: {output:?}");
            assert!(line(&output).contains(&format!("no daemon answers on {socket}")), "{output:?}");
            assert!(output.stdout.is_empty());
        }
    }
    let output =
        Command::new(env!("CARGO_BIN_EXE_vmfs")).arg("ls").env("VMFS_SOCKET", &socket).output().unwrap();
    assert!(line(&output).contains(socket.to_str().unwrap()), "the variable is used");
}

#[test]
fn invitation_that_cannot_be_made_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("s"), dir.path().join("invitation"));
    let invite = ["host", "invite", "b", "--output", file.to_str().unwrap()];
    let args = [&["--socket", socket.to_str().unwrap()], &invite[..]].concat();
    assert_eq!(code(&vmfs(&args)), 1);
    assert!(!file.exists());
    std::fs::write(&file, "precious").unwrap();
    assert_eq!(code(&vmfs(&args)), 1);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
}

#[test]
fn down_and_up_refuse_foreign_directories() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let output = vmfs(&["down", path]);
    assert_eq!(code(&output), 1);
    assert!(line(&output).ends_with("is not a directory of vmfs up"));
    assert_eq!(code(&vmfs(&["down", dir.path().join("missing").to_str().unwrap()])), 1);
    std::fs::write(dir.path().join("thesis.txt"), "x").unwrap();
    let output = vmfs(&["up", path, "--detach"]);
    assert_eq!(code(&output), 1);
    assert!(line(&output).ends_with("is not empty and no directory of vmfs up"));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was made");
}

#[test]
fn datastore_is_made_once_and_its_configuration_is_valid() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (config, identity, store, mount) = (at("etc/vmfs.toml"), at("identity"), at("store"), at("mnt"));
    let args = [
        "datastore",
        "init",
        "--host",
        "a",
        "--address",
        "127.0.0.1:4410",
        "--config",
        &config,
        "--identity",
        &identity,
        "--store",
        &store,
        "--mount",
        &mount,
    ];
    let output = vmfs(&args);
    assert_eq!(code(&output), 0, "{output:?}");
    let made = vmfs_replica::config_file::load(Path::new(&config)).unwrap();
    assert_eq!((made.host.as_str(), made.store.dir.to_str()), ("a", Some(store.as_str())));
    assert_eq!(made.network.listen.to_string(), "0.0.0.0:4410");
    assert_eq!(vmfs_net::HostIdentity::load(Path::new(&identity)).unwrap().name(), "a");
    let again = vmfs(&args);
    assert_eq!(code(&again), 1);
    assert!(line(&again).contains("exists already"));
    let elsewhere = at("other.toml");
    let args: Vec<&str> = args.iter().map(|w| if *w == config { elsewhere.as_str() } else { w }).collect();
    assert_eq!(code(&vmfs(&args)), 1, "the identity is there");
    assert!(!Path::new(&elsewhere).exists(), "a refusal leaves no configuration");
}

#[test]
fn bad_invitations_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (config, identity, file) = (at("vmfs.toml"), at("identity"), at("token"));
    std::fs::write(&file, "no token\n").unwrap();
    let missing = at("missing");
    for token in ["vmfs1-invite-00", file.as_str(), missing.as_str()] {
        let output = vmfs(&["host", "join", token, "--config", &config, "--identity", &identity]);
        assert_eq!(code(&output), 1, "{output:?}");
        line(&output);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let output = vmfs(&["host", "join", "x", "--witness", "--mount", "/m"]);
    assert_eq!(code(&output), 2);
}

#[test]
fn daemons_refuse_a_bad_configuration_in_one_line() {
    use std::os::unix::process::CommandExt as _;
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("vmfs.toml");
    std::fs::write(
        &config,
        "host = \"a\"\nstore.dir = \"s\"\nidentity.dir = \"i\"\nmount.point = \"m\"\ncolour = 1\n",
    )
    .unwrap();
    for daemon in ["vmfs-fuse", "vmfs-replica"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfs"));
        let output = command.arg0(daemon).arg("--config").arg(&config).output().unwrap();
        let text = String::from_utf8(output.stderr.clone()).unwrap();
        assert_eq!(code(&output), 1, "{output:?}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(
            text.contains("line 5, column 1") && text.matches("unknown field `colour`").count() == 1,
            "{text}"
        );
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfs"));
        assert_eq!(code(&command.arg0(daemon).arg("--frob").output().unwrap()), 2);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was made");
}

/// Answers every request on `listener` with `body`; gives back the requests when it is joined.
fn answer(listener: UnixListener, answers: Vec<(u16, String)>) -> std::thread::JoinHandle<Vec<String>> {
    std::thread::spawn(move || {
        let serve = |(status, body): (u16, String)| {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            loop {
                let n = stream.read(&mut buffer).unwrap();
                request.extend_from_slice(&buffer[..n]);
                let text = String::from_utf8_lossy(&request).into_owned();
                let Some((head, sent)) = text.split_once("\r\n\r\n") else { continue };
                let length = head
                    .lines()
                    .find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
                if sent.len() >= length.unwrap_or(0) {
                    break;
                }
            }
            let head =
                format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).unwrap();
            String::from_utf8(request).unwrap()
        };
        answers.into_iter().map(serve).collect()
    })
}

/// Runs `vmfs args` against canned answers.
fn against(answers: Vec<(u16, &str)>, args: &[&str]) -> (Output, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let answers = answers.into_iter().map(|(status, body)| (status, body.to_owned())).collect();
    let served = answer(UnixListener::bind(&socket).unwrap(), answers);
    let output = vmfs(&[&["--socket", socket.to_str().unwrap()], args].concat());
    (output, served.join().unwrap())
}

#[test]
fn refusal_for_lack_of_a_quorum_is_exit_code_3() {
    let refused = r#"{"error":{"code":"no_quorum","message":"1 of 3 members reachable, 2 needed"}}"#;
    let (output, requests) = against(vec![(200, refused)], &["promote", "vm/a.img"]);
    assert_eq!(code(&output), 3);
    assert_eq!(line(&output), "vmfs: 1 of 3 members reachable, 2 needed");
    assert!(requests[0].starts_with("POST /v1/promote "), "{}", requests[0]);
    assert!(requests[0].ends_with(r#"{"image":"vm/a.img","force":false,"members":[]}"#), "{}", requests[0]);
}

#[test]
fn promotion_says_what_may_be_missing_and_shows_no_progress_when_piped() {
    let id = "0".repeat(32);
    let lines = format!(
        "{}\n{}\n",
        r#"{"progress":{"stage":"votes","done":1,"total":2,"unit":"members"}}"#,
        format_args!(
            r#"{{"done":{{"image":"a","id":"{id}","epoch":4,"seq":9,"loss":{{"kind":"nothing"}},"forced":false,"elapsed_ms":7,"from_the_future":1}}}}"#
        )
    );
    let (output, _) = against(vec![(200, &lines)], &["promote", "a"]);
    assert_eq!((code(&output), output.stderr.as_slice()), (0, &b""[..]));
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, "a: owned by this host since epoch 4 (7 ms); nothing acknowledged is missing\n");
}

#[test]
fn answers_that_are_cut_off_or_nonsense_are_failures() {
    for body in ["", "{}", "nonsense", r#"{"progress":{"stage":"x","done":1,"unit":"bytes"}}"#] {
        let (output, _) = against(vec![(200, &format!("{body}\n"))], &["verify", "a"]);
        assert_eq!(code(&output), 1, "{body}");
        assert!(line(&output).contains("bad answer from the daemon"), "{output:?}");
    }
    let (output, _) =
        against(vec![(404, r#"{"code":"not_found","message":"a: no such image"}"#)], &["info", "a"]);
    assert_eq!((code(&output), line(&output).as_str()), (1, "vmfs: a: no such image"));
}

#[test]
fn host_path_of_an_image_is_understood() {
    let zero = "0".repeat(32);
    let status = format!(
        r#"{{"host":"a","host_id":"{zero}","store_id":"{zero}","datastore":"{zero}","mount":"/srv/vm","version":"1","peers":[],"images":[],"refusals":{{}}}}"#
    );
    let missing = r#"{"code":"not_found","message":"no such image"}"#;
    for (text, asked) in [("/srv/vm/x/a.img", "x/a.img"), ("/x/a.img", "x/a.img"), ("/srv/vmx", "srv/vmx")] {
        let (output, requests) = against(vec![(200, &status), (404, missing)], &["info", text]);
        assert_eq!(code(&output), 1);
        assert!(requests[1].starts_with(&format!("GET /v1/image?image={asked} ")), "{}", requests[1]);
    }
}

#[test]
fn closed_standard_output_is_no_panic() {
    let mut child = Command::new("sh")
        .args(["-c", "\"$0\" --help | true; exit 0", env!("CARGO_BIN_EXE_vmfs")])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    assert_eq!(said, "");
}

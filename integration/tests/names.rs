//! Names that fail over with their images: what other hosts show while a file is replaced or removed, and
//! after a crash in the middle of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;

use integration::harness::wait::secs;
use integration::harness::{Cluster, bytes, until};

/// What host b shows under `name`, once it is this.
fn wait_shows(cluster: &Cluster, host: &str, name: &str, content: &[u8]) {
    until(&format!("{host} shows the new {name}"), secs(10), || {
        std::fs::read(cluster.file(host, name)).ok().filter(|seen| seen == content)
    });
}

fn shown(cluster: &Cluster, host: &str) -> Vec<String> {
    let names = std::fs::read_dir(cluster.mnt(host)).unwrap();
    let mut names: Vec<_> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_replaced_image_that_is_still_open_gives_its_name_up_everywhere() {
    let cluster = Cluster::start("replaced");
    // The lowest id would win a name that both claim: several rounds, so that the old one has it in some.
    for round in 0..6u8 {
        let (old, new) = (bytes::noise(round.into(), 65536), bytes::noise(100 + u64::from(round), 65536));
        std::fs::write(cluster.file("a", "x"), &old).unwrap();
        let open = File::options().read(true).write(true).open(cluster.file("a", "x")).unwrap();
        open.sync_all().unwrap();
        wait_shows(&cluster, "b", "x", &old);
        std::fs::write(cluster.file("a", "x.new"), &new).unwrap();
        std::fs::rename(cluster.file("a", "x.new"), cluster.file("a", "x")).unwrap();
        wait_shows(&cluster, "b", "x", &new);
        until("nothing else is shown", secs(10), || {
            ["a", "b", "c"].iter().all(|h| shown(&cluster, h) == ["x"]).then_some(())
        });
        // The open one lives: it is read, written and flushed, longer than deleted images are kept without
        // need, and its members hold it too.
        std::thread::sleep(secs(2));
        open.write_all_at(&[round; 4096], 4096).unwrap();
        open.sync_all().unwrap();
        let mut block = [0; 4096];
        open.read_exact_at(&mut block, 4096).unwrap();
        assert_eq!(block, [round; 4096]);
        open.read_exact_at(&mut block, 0).unwrap();
        assert_eq!(block, old[..4096]);
        drop(open);
        let _ = cluster.vmfs("b", &["info", "x"]).ok();
        cluster.assert_copies_identical("x");
        std::fs::remove_file(cluster.file("a", "x")).unwrap();
    }
}

#[test]
fn a_file_without_a_name_is_written_and_flushed_until_its_last_close() {
    let cluster = Cluster::start("nameless");
    let path = cluster.file("a", "t");
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    for round in 0..4u8 {
        std::thread::sleep(secs(1));
        file.write_all_at(&[round; 8192], u64::from(round) * 8192).unwrap();
        file.sync_all().unwrap();
    }
    drop(file);
    // Its space comes back where it was made; the members keep it for the undelete window.
    until("the owner has given it back", secs(10), || {
        let images = std::fs::read_dir(cluster.store("a").join("map")).ok()?;
        (images.count() == 0).then_some(())
    });
}

#[test]
fn a_crash_or_a_promotion_between_the_steps_of_a_replacement_loses_neither_image() {
    for promoted in ["new", "old"] {
        let cluster = Cluster::start("halfway");
        let (old, new) = (bytes::noise(1, 65536), bytes::noise(2, 65536));
        for (name, content) in [("x", &old), ("y", &new)] {
            std::fs::write(cluster.file("a", name), content).unwrap();
            File::open(cluster.file("a", name)).unwrap().sync_all().unwrap();
            cluster.wait_in_sync(name);
        }
        let open = File::open(cluster.file("a", "x")).unwrap();
        // Nothing of it can be committed: the name reaches the replacer's chain here, and nothing else.
        for host in ["b", "c"] {
            cluster.kill9(host);
        }
        std::fs::rename(cluster.file("a", "y"), cluster.file("a", "x")).unwrap();
        cluster.kill9("a");
        drop(open);
        for host in ["b", "c"] {
            cluster.restart(host);
        }
        // b knows of no replacement: both are there under their old names, and either can be promoted.
        let name = if promoted == "new" { "y" } else { "x" };
        until("b can be promoted", secs(20), || {
            cluster.vmfs("b", &["promote", name]).status.success().then_some(())
        });
        let expected = if promoted == "new" { &new } else { &old };
        assert_eq!(&std::fs::read(cluster.file("b", name)).unwrap(), expected);
        cluster.restart("a");
        // a replaces what is still its own to replace, and loses neither content.
        until("both contents are somewhere", secs(30), || {
            let contents: Vec<_> = shown(&cluster, "a")
                .iter()
                .filter_map(|n| std::fs::read(cluster.file("a", n)).ok())
                .collect();
            let both = contents.contains(&new) && (promoted == "new" || contents.contains(&old));
            both.then_some(())
        });
    }
}

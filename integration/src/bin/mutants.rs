//! Runs the seeded bugs of `integration/mutations`: `mutants [--baseline] [NAME...]`.

use std::process::ExitCode;
use std::time::Instant;

use integration::mutants::{Fate, Mutant, Scratch, all};

const USAGE: &str = "usage: mutants [--baseline] [NAME...]

Applies each patch of integration/mutations (or those whose names contain NAME) to a copy of the tree
under target/mutants, runs the tests that its header names until one fails, and prints a table.
Exits 1 when a bug is not caught. --baseline first runs all those tests on the unpatched tree.";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--help" || (a.starts_with('-') && a != "--baseline")) {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("mutants: {e}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &[String]) -> std::io::Result<bool> {
    let names: Vec<&String> = args.iter().filter(|a| !a.starts_with('-')).collect();
    let mut mutants = all()?;
    mutants.retain(|m| names.is_empty() || names.iter().any(|n| m.name.contains(n.as_str())));
    let scratch = Scratch::new()?;
    if args.iter().any(|a| a == "--baseline") && !baseline(&scratch, &mutants)? {
        return Ok(false);
    }
    let (mut caught, mut rows) = (0, Vec::new());
    for m in &mutants {
        let began = Instant::now();
        let fate = scratch.run(m)?;
        let (seconds, what) = (began.elapsed().as_secs(), m.breaks.as_str());
        match &fate {
            Fate::Caught(test) => {
                caught += 1;
                println!("{}: caught by {test} ({seconds} s)", m.name);
                rows.push(format!("| {} | {what} | {} | `{test}` |", m.name, m.promise));
            }
            Fate::Survived => println!("{}: NOT CAUGHT: {what} ({seconds} s)", m.name),
            Fate::Broken(why) => println!("{}: BROKEN ({seconds} s):\n{why}", m.name),
        }
    }
    println!("\n| mutant | breaks | promise or rule | caught by |\n| --- | --- | --- | --- |");
    rows.iter().for_each(|r| println!("{r}"));
    println!("\n{caught} of {} caught", mutants.len());
    Ok(caught == mutants.len())
}

/// The tests pass without any patch; else "caught" would mean nothing.
fn baseline(scratch: &Scratch, mutants: &[Mutant]) -> std::io::Result<bool> {
    let mut sets: Vec<Vec<String>> = mutants.iter().flat_map(|m| m.tests.clone()).collect();
    sets.sort();
    sets.dedup();
    match scratch.tests(&sets)? {
        Fate::Survived => {
            println!("{} sets of tests pass on the unpatched tree", sets.len());
            Ok(true)
        }
        Fate::Caught(test) => {
            println!("{test} fails on the unpatched tree");
            Ok(false)
        }
        Fate::Broken(why) => {
            println!("the unpatched tree: {why}");
            Ok(false)
        }
    }
}

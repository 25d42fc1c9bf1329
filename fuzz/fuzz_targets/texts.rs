#![no_main]

fuzzing::libfuzzer_main!("texts");

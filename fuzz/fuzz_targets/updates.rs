#![no_main]

fuzzing::libfuzzer_main!("updates");

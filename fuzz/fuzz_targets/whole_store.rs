#![no_main]

fuzzing::libfuzzer_main!("whole_store");

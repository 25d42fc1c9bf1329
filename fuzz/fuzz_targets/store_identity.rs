#![no_main]

fuzzing::libfuzzer_main!("store_identity");

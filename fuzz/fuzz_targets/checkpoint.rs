#![no_main]

fuzzing::libfuzzer_main!("checkpoint");

#![no_main]

fuzzing::libfuzzer_main!("meta_journal");

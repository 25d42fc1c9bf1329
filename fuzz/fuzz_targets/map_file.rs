#![no_main]

fuzzing::libfuzzer_main!("map_file");

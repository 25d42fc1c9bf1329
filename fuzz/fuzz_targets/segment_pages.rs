#![no_main]

fuzzing::libfuzzer_main!("segment_pages");

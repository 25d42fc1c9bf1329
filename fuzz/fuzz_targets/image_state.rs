#![no_main]

fuzzing::libfuzzer_main!("image_state");

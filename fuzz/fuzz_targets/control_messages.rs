#![no_main]

fuzzing::libfuzzer_main!("control_messages");

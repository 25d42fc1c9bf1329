#![no_main]

fuzzing::libfuzzer_main!("api_requests");

# A prefill worker. UCX needs the worker's own address to be reachable from the others: host networking.
job "triptych-prefill" {
  group "prefill" {
    count = 1

    network {
      mode = "host"
    }

    task "prefill" {
      driver = "docker"
      # Longer than --drain-s.
      kill_timeout = "60s"

      config {
        image        = "triptych"
        network_mode = "host"
        args         = ["prefill", "--drain-s", "40"]
      }

      env {
        TRIPTYCH_BUS__URL           = "nats://nats.service.consul:4222"
        TRIPTYCH_MODEL__SERVED_NAME = "triptych-demo"
        OMP_NUM_THREADS             = "2"
      }

      resources {
        cpu    = 2000
        memory = 4096
      }
    }
  }
}

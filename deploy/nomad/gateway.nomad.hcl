# The HTTP gateway.
job "triptych-gateway" {
  group "gateway" {
    count = 1

    network {
      port "http" {
        static = 8000
      }
    }

    service {
      name     = "triptych"
      port     = "http"
      provider = "consul"

      check {
        type     = "http"
        path     = "/ready"
        interval = "5s"
        timeout  = "2s"
      }
    }

    task "gateway" {
      driver       = "docker"
      kill_timeout = "60s"

      config {
        image = "triptych"
        args  = ["gateway", "--host", "0.0.0.0", "--port", "8000"]
        ports = ["http"]
      }

      env {
        TRIPTYCH_BUS__URL           = "nats://nats.service.consul:4222"
        TRIPTYCH_MODEL__SERVED_NAME = "triptych-demo"
      }

      resources {
        cpu    = 500
        memory = 1024
      }
    }
  }
}

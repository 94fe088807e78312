// The same with a goroutine for each connection.
package main

import (
	"log"
	"net"
	"os"
	"strconv"
	"time"
)

func answer(conn net.Conn, delay time.Duration, reply []byte) {
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1024)); err != nil {
		return
	}
	time.Sleep(delay)
	conn.Write(reply)
}

func main() {
	seconds, err := strconv.ParseFloat(os.Getenv("DELAY"), 64)
	if err != nil {
		log.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go answer(conn, time.Duration(seconds*float64(time.Second)), []byte(os.Getenv("REPLY")))
	}
}

/* What the kernel alone costs: one connection after the other, no pause, no concurrency. */
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
    const char *reply = getenv("REPLY");
    struct sockaddr_in address = {
        .sin_family = AF_INET,
        .sin_port = htons(atoi(getenv("PORT"))),
        .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
    };
    char request[1024];
    int listener = socket(AF_INET, SOCK_STREAM, 0);

    signal(SIGPIPE, SIG_IGN);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int));
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 65535)) {
        perror("floor");
        return 1;
    }
    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client < 0)
            continue;
        if (recv(client, request, sizeof request, 0) > 0)
            send(client, reply, strlen(reply), 0);
        close(client);
    }
}
